"""Training steps of whole methods against the plain PyTorch way: forward, backward and optimiser, taking turns.

Ours is the step that `fastmim.train` runs (gradient norm and finite check included; on a GPU captured as a CUDA graph).
The plain way is its twin in benchmarks/baselines with the same fused AdamW (or torch's default one,
`--baseline-optimizer default`), eager or under torch.compile (`--baseline-compile`), looking at the loss in each step,
as the papers' repositories do. `--ablate` adds a row for each fusion and pruning, on a GPU one for the graph too: our
step against our step with that one thing done the plain way.
"""

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ablation import pieces, without
from benchmarks.baselines import baseline_of
from benchmarks.ops import add_machine_options, choose, command_line, prepare_machine
from benchmarks.runner import DTYPES, BenchmarkError, Case, Row, Settings, Side, run_cases, write_rows
from benchmarks.table import show
from fastmim.engine import OptimConfig
from fastmim.engine.capture import CudaGraphs, GraphedStep, why_no_graph
from fastmim.engine.optimizer import create_optimizer, set_lr
from fastmim.engine.step import TrainStep
from fastmim.methods import create_method, list_methods, method_config
from fastmim.models import create_encoder

GRAPH = "CUDA graph"  # a piece of every method
_LR = 1e-4
_MODELS = {"spark": "convnext_small", "fcmae": "convnextv2_tiny"}  # methods that take CNNs alone
_MODEL = "vit_small_patch16_224"  # of the others
_QUICK = {"spark": 64, "fcmae": 64, "mixedae": 64}  # at least two cells of 32 pixels; 16 patches to mix


def our_step(method: Any, precision: str, batch_size: int, graph: bool = True) -> Callable[[Tensor], None]:
    """The engine's own step; with `graph` captured where that is possible, as `fastmim.train` does."""
    device = next(method.parameters()).device
    optim = OptimConfig(lr=_LR)
    optimizer = create_optimizer(method, optim)
    set_lr(optimizer, _LR)
    step: TrainStep | GraphedStep = TrainStep(
        method,
        optimizer,
        optim,
        precision=precision,
        device=device,
        seed=0,
        micro_batch=batch_size,
        stop=True,
        ema=None,
    )
    if graph and not why_no_graph("auto", device, optimizer):
        step = GraphedStep(step, CudaGraphs(device), must=True)
    done = 0

    def run(images: Tensor) -> None:
        nonlocal done
        step(images, None, None, done)
        done += 1

    return run


def plain_step(
    plain: nn.Module, precision: str, optimizer_name: str = "fused", compiled: bool = False
) -> Callable[[Tensor], None]:
    """What a training script does: autocast, backward, AdamW, and a look at the loss."""
    forward = torch.compile(plain) if compiled else plain
    trained = [p for p in plain.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_LR, betas=(0.9, 0.95), fused=True if optimizer_name == "fused" else None)
    device = trained[0].device

    def run(images: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = forward(images)
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise BenchmarkError("the loss of the plain way is not finite")

    return run


def resident_bytes(model: nn.Module) -> int:
    """Weights, buffers, gradients and AdamW's two averages: what a training run keeps between steps."""
    kept = [*model.parameters(), *model.buffers()]
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(t.numel() * t.element_size() for t in kept) + 3 * sum(p.numel() * p.element_size() for p in trained)


def count_flops(plain: nn.Module, images: Tensor) -> int:
    """Of matrix products, convolutions and attention in forward and backward, counted on the plain twin."""
    few = images[:4]  # a group of MixedAE
    with FlopCounterMode(display=False) as counter:
        plain(few).backward()
    plain.zero_grad(set_to_none=True)
    return counter.get_total_flops() * images.shape[0] // few.shape[0]


def step_case(
    method_name: str,
    model: str,
    img_size: tuple[int, int],
    batch_size: int,
    precision: str,
    device: torch.device,
    settings: Mapping[str, Any] | None = None,
    baseline_precision: str | None = None,
    baseline_optimizer: str = "fused",
    baseline_compile: bool = False,
) -> Case:
    """The case of one method, encoder and precision; building it builds both models. `settings` are the method's."""
    method = _method(method_name, model, img_size, device, settings)
    plain = baseline_of(method)
    baseline_precision = baseline_precision or precision
    name = "plain PyTorch" + (f" {baseline_precision}" if baseline_precision != precision else "")
    name += ", default AdamW" if baseline_optimizer == "default" else ""
    name += ", torch.compile" if baseline_compile else ""
    plainer = plain_step(plain, baseline_precision, baseline_optimizer, baseline_compile)
    shape = (batch_size, method.encoder.in_chans, *img_size)
    return Case(
        op=method_name,
        case=_case_text(model, img_size, batch_size, settings),
        candidate=Side("auto", our_step(method, precision, batch_size), resident_bytes(method)),
        baseline=Side(name, plainer, resident_bytes(plain)),
        inputs=lambda: (torch.randn(shape, device=device),),
        dtype=DTYPES[precision],
        passes=("step",),
        images=batch_size,
        # The plain twin of a method on tiles also computes what is masked: its count says nothing of ours.
        flops={} if method.name in _MODELS else {"step": count_flops(plain, torch.randn(shape, device=device))},
    )


def ablation_case(
    piece: str,
    method_name: str,
    model: str,
    img_size: tuple[int, int],
    batch_size: int,
    precision: str,
    device: torch.device,
    settings: Mapping[str, Any] | None = None,
) -> Case:
    """Our step against our step without one piece of `ablation.pieces(method_name)`, or without the `GRAPH`."""
    ours, other = (_method(method_name, model, img_size, device, settings) for _ in range(2))
    plainer = our_step(other, precision, batch_size, graph=piece != GRAPH)
    if piece != GRAPH:
        plainer = without(plainer, other, pieces(method_name)[piece])
    shape = (batch_size, ours.encoder.in_chans, *img_size)
    return Case(
        op=method_name,
        case=_case_text(model, img_size, batch_size, settings),
        candidate=Side("auto", our_step(ours, precision, batch_size), resident_bytes(ours)),
        baseline=Side(f"without {piece}", plainer, resident_bytes(other)),
        inputs=lambda: (torch.randn(shape, device=device),),
        dtype=DTYPES[precision],
        passes=("step",),
        images=batch_size,
    )


def _method(
    name: str, model: str, img_size: tuple[int, int], device: torch.device, settings: Mapping[str, Any] | None
) -> Any:
    torch.manual_seed(0)
    cfg = method_config(name)(**(settings or {}))
    return create_method(name, create_encoder(model, img_size=img_size), cfg, img_size).to(device).train()


def _case_text(model: str, img_size: tuple[int, int], batch_size: int, settings: Mapping[str, Any] | None) -> str:
    size = f"{img_size[0]}px" if img_size[0] == img_size[1] else f"{img_size[0]}x{img_size[1]}px"
    return f"{model} {size} B{batch_size}" + "".join(f" {key}={value}" for key, value in (settings or {}).items())


def _image_size(text: str) -> tuple[int, int]:
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no image size; write 224 or 224x192 (height x width)")
    return sides[0], sides[-1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    known = ", ".join(list_methods())
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help=f"of {known}; default: all that fit")
    own = ", ".join(f"{model} ({method})" for method, model in _MODELS.items())
    help = f"encoders, by timm's names; default: {_MODEL}, or {own}"
    parser.add_argument("--model", nargs="+", default=[], help=help)
    help = "settings of the methods, where they have them: decoder=light mask_ratio=0.75"
    parser.add_argument("--settings", nargs="+", type=_setting, default=[], metavar="KEY=VALUE", help=help)
    parser.add_argument("--img_size", type=_image_size, help="224 (the default), or 224x192 (height x width)")
    parser.add_argument("--batch_size", type=int, default=None, help="default: 16 on a CPU, 256 on a GPU")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="default: fp32")
    help = "of the plain way; default: that of our side"
    parser.add_argument("--baseline-precision", choices=("fp32", "bf16"), default=None, help=help)
    help = "AdamW of the plain way: fused, as ours (the default), or the one that torch takes when not told"
    parser.add_argument("--baseline-optimizer", choices=("fused", "default"), default="fused", help=help)
    help = "the plain way under torch.compile"
    parser.add_argument("--baseline-compile", action="store_true", help=help)
    help = "also a row for each fusion and pruning, on a GPU for the graph too: our step against our step without it"
    parser.add_argument("--ablate", action="store_true", help=help)
    parser.add_argument("--steps", type=int, default=None, help="measured steps of each side; default: 10, on a GPU 30")
    parser.add_argument("--quick", action="store_true", help="four images of 32 pixels, one step: does everything run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    add_machine_options(parser)
    return parser


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write KEY=VALUE, such as decoder=light")
    return key, yaml.safe_load(value)


def _sizes(given: tuple[int, int] | None, quick: bool, methods: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The image size of every method."""
    sides = {method: _QUICK.get(method, 32) if quick else 224 for method in methods}
    return {method: given or (side, side) for method, side in sides.items()}


def _settings_of(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the method has."""
    known = {item.name for item in fields(method_config(method))}
    return {key: value for key, value in settings.items() if key in known}


def _combinations(
    wanted: Sequence[str],
    models: Sequence[str],
    sizes: Mapping[str, tuple[int, int]],
    settings: Mapping[str, Any] | None = None,
) -> list[tuple[str, str]]:
    """(method, model) pairs to measure. They are built without memory first: a method that was asked for and does not
    fit an encoder is an error before anything is measured; without names, such methods are left out.

    Raises:
        ValueError: an unknown name, a setting that no method has, or a pair asked for that does not fit.
    """
    pairs = []
    methods = choose(wanted, list_methods(), "method")
    for key in settings or {}:
        if not any(_settings_of(method, {key: None}) for method in methods):
            raise ValueError(f"--settings {key}: none of {', '.join(methods)} has such a setting")
    for method in methods:
        for model in models or [_MODELS.get(method, _MODEL)]:
            with torch.device("meta"):
                encoder = create_encoder(model, img_size=sizes[method])
                try:
                    cfg = method_config(method)(**_settings_of(method, settings or {}))
                    create_method(method, encoder, cfg, sizes[method])
                except ValueError as error:
                    if wanted:
                        raise
                    print(f"left out: {error}", file=sys.stderr)
                    continue
            pairs.append((method, model))
    return pairs


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        device = prepare_machine(options)
        settings_given = dict(options.settings)
        sizes = _sizes(options.img_size, options.quick, list_methods())
        pairs = _combinations(options.methods, options.model, sizes, settings_given)
        batch_size = options.batch_size or (4 if options.quick else 256 if device.type == "cuda" else 16)
        if batch_size < 2:
            raise ValueError(f"--batch_size {batch_size}: at least 2 images are needed")
    except (ValueError, RuntimeError) as error:
        print(f"benchmarks.throughput: {error}", file=sys.stderr)
        return 2
    settings = Settings(
        device=device,
        quick=options.quick,
        rounds=options.steps or (1 if options.quick else 30 if device.type == "cuda" else 10),
        warmup=5 if device.type == "cuda" else 1,  # a GPU: three eager steps, the capture, a replay
    )
    command = command_line("benchmarks.throughput", arguments)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row | {"command": command})
        if options.json:
            write_rows(rows, options.json)

    failures: list[str] = []
    for (method, model), precision in itertools.product(pairs, options.precision):
        own = _settings_of(method, settings_given)
        common = (method, model, sizes[method], batch_size, precision, device, own)
        plain = (options.baseline_precision, options.baseline_optimizer, options.baseline_compile)
        builders = [functools.partial(step_case, *common, *plain)]
        if options.ablate:
            names = [*pieces(method), *([GRAPH] if device.type == "cuda" else [])]
            builders += [functools.partial(ablation_case, piece, *common) for piece in names]
        for build in builders:  # one case at a time: each holds two models
            try:
                case = build()
            except (ValueError, RuntimeError) as error:
                failures.append(f"{method} {model} {precision}: {error}")
                continue
            failures += run_cases([case], settings, keep)[1]
            del case
    show(rows)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
