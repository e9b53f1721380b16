"""Images per second of every way to read them, and how much of a training step is spent waiting for them.

`load`: batches of random crops from a folder of JPEGs, 500 x 375 (cut from scikit-learn's two photographs), by Pillow
in 0, 1, ... worker processes and by DALI on the CPU and, where there is one, the GPU; the plain way is torch's
DataLoader around Pillow with as many workers. A loader is started anew for every sample, and what it makes while it
fills its queues is not counted. `step`, `load` and `load + step` of a method: the model on one batch again and again,
the loader alone, both together, and the share of the time that the model then waits.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.baselines.loading import plain_loader
from benchmarks.ceilings import hardware
from benchmarks.loading import Setting, Way, interleaved, loading, ours, stepping, training, ways_here
from benchmarks.ops import add_machine_options, command_line, prepare_machine
from benchmarks.photographs import write_photographs
from benchmarks.rows import Row, write_rows
from benchmarks.table import show
from benchmarks.throughput import our_step
from benchmarks.timing import percentile
from fastmim.data.loader import cpus
from fastmim.engine.precision import choose_precision
from fastmim.methods import create_method, method_config
from fastmim.models import create_encoder


def load_rows(setting: Setting, ways: Sequence[Way], views: int, output: str) -> Iterator[Row]:
    """Every way, and the plain way with as many workers."""
    numbers = sorted({way.workers for way in ways})
    specs = setting.views(views)
    samples = [loading(setting, partial(ours, setting, way, views, output), way.workers) for way in ways]
    samples += [
        loading(setting, partial(plain_loader, setting.folder, specs, output, setting.batch_size, number), number)
        for number in numbers
    ]
    taken = interleaved(samples, setting.rounds)
    plain = dict(zip(numbers, taken[len(ways) :], strict=True))
    many = "1 view" if views == 1 else f"{views} views"
    for way, times in zip(ways, taken, strict=False):
        case = f"JPEG 500x375 to {setting.side}px, {many}, B{setting.batch_size}, {way}"
        baseline = f"DataLoader, {Way('', way.workers)}"
        yield row_of(setting, "data", case, "load", output, way, times, baseline, plain[way.workers])


def training_rows(setting: Setting, ways: Sequence[Way], method_name: str, model: str, precision: str) -> Iterator[Row]:
    """The model alone, each loader alone, both together."""
    torch.manual_seed(0)
    size = (setting.side, setting.side)
    method = create_method(method_name, create_encoder(model, img_size=size), method_config(method_name)(), size)
    step = our_step(method.to(setting.device).train(), precision, setting.batch_size)
    images = torch.randn(setting.batch_size, 3, *size, device=setting.device)
    output = "uint8" if setting.device.type == "cuda" else "float32"
    waits: dict[Way, list[float]] = {way: [] for way in ways}
    samples = [stepping(setting, step, images)]
    for way in ways:
        start = partial(ours, setting, way, 1, output)
        samples += [loading(setting, start, way.workers), training(setting, start, step, waits[way])]
    alone, *others = interleaved(samples, setting.rounds)
    case = f"{model} {setting.side}px B{setting.batch_size}"
    yield row_of(setting, method_name, case, "step", precision, None, alone)
    for number, way in enumerate(ways):
        loaded, both = others[2 * number : 2 * number + 2]
        named = f"{case}, {way}"
        yield row_of(setting, method_name, named, "load", output, way, loaded, "step alone", alone)
        row = row_of(setting, method_name, named, "load + step", precision, way, both, "step alone", alone)
        yield row | {"data_wait": percentile(waits[way], 50)}


def row_of(
    setting: Setting,
    op: str,
    case: str,
    name: str,
    dtype: str,
    way: Way | None,
    times: list[float],
    baseline: str | None = None,
    baseline_times: list[float] | None = None,
) -> Row:
    ms = percentile(times, 50)
    row: Row = {
        "op": op,
        "case": case,
        "pass": name,
        "dtype": {"float32": "fp32"}.get(dtype, dtype),
        "backend": "auto" if way is None else way.name,
        "ms": ms,
        "baseline": baseline,
        "baseline_ms": None,
        "ratio": None,
        "peak_mb": None,
        "baseline_peak_mb": None,
        "p20": percentile(times, 20),
        "p80": percentile(times, 80),
        "rounds": len(times),
        "images_per_second": setting.batch_size / ms * 1e3,
        "workers": None if way is None else way.workers,
        "hardware": hardware(setting.device),
        "cpus": cpus(),
        "torch": torch.__version__,
    }
    if baseline_times is not None:
        median = percentile(baseline_times, 50)
        paired = [theirs / mine for mine, theirs in zip(times, baseline_times, strict=True)]
        row |= {"baseline_ms": median, "ratio": median / ms, "ratio_p20": percentile(paired, 20)}
        row |= {"ratio_p80": percentile(paired, 80), "baseline_images_per_second": setting.batch_size / median * 1e3}
    return row | {"load_average": os.getloadavg()[0]} if hasattr(os, "getloadavg") else row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few small images and steps: does everything run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    add_machine_options(parser)
    help = "of Pillow, and threads of DALI (not 0); default: 0 1 and one per CPU"
    parser.add_argument("--workers", nargs="+", type=int, default=None, help=help)
    parser.add_argument("--parts", nargs="+", choices=("load", "step"), default=["load", "step"], help="default: both")
    parser.add_argument("--outputs", nargs="+", choices=("float32", "uint8"), default=["float32", "uint8"])
    parser.add_argument("--views", nargs="+", type=int, choices=(1, 3), default=[1, 3], help="default: 1 3")
    parser.add_argument("--images", type=int, default=None, help="files to make; default: 512")
    parser.add_argument("--batch_size", type=int, default=None, help="of loading alone; default: 32")
    help = "of the steps; default: 16 on a CPU, 64 on a GPU"
    parser.add_argument("--step-batch-size", type=int, default=None, help=help)
    parser.add_argument("--method", default="mae", help="whose step is measured with the loaders; default: mae")
    parser.add_argument("--model", default=None, help="its encoder; default: vit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=None, help="samples of each; default: 5")
    parser.add_argument("--seconds-per-sample", type=float, default=None, help="default: 1")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    quick = options.quick
    try:
        device = prepare_machine(options)
        workers = sorted(set(options.workers if options.workers is not None else (0, 1, cpus())))
        if min(workers) < 0:
            raise ValueError(f"--workers {min(workers)}: 0 or more are needed")
        ways, missing = ways_here(workers, device)
    except (ValueError, RuntimeError) as error:
        print(f"benchmarks.data: {error}", file=sys.stderr)
        return 2
    for line in missing:
        print(line, file=sys.stderr)
    command = command_line("benchmarks.data", arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(
            folder=Path(temporary),
            side=32 if quick else 224,
            batch_size=options.batch_size or (4 if quick else 32),
            device=device,
            seconds=options.seconds_per_sample or (0.001 if quick else 1.0),
            rounds=options.rounds or (1 if quick else 5),
        )
        write_photographs(setting.folder, options.images or (16 if quick else 512))

        def measured() -> Iterator[Row]:
            if "load" in options.parts:
                for views, output in itertools.product(options.views, options.outputs):
                    yield from load_rows(setting, ways, views, output)
            if "step" in options.parts:
                model = options.model or ("vit_tiny_patch16_224" if quick else "vit_small_patch16_224")
                precision = choose_precision("auto", device)[0]
                most = [way for way in ways if way.workers == workers[-1]]
                batch_size = options.step_batch_size or (4 if quick else 64 if device.type == "cuda" else 16)
                own = replace(setting, batch_size=batch_size)
                yield from training_rows(own, most, options.method, model, precision)

        try:
            for row in measured():
                rows.append(row | {"command": command})
                if options.json:
                    write_rows(rows, options.json)
        except ValueError as error:
            print(f"benchmarks.data: {error}", file=sys.stderr)
            return 2
    show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
