"""Pre-train an encoder: `python -m fastmim.train --recipe NAME --data.root DIR`. Without arguments: a small run."""

import copy
import json
import logging
from typing import TYPE_CHECKING

from fastmim.command_line import command, parse
from fastmim.config import ConfigError, TrainConfig, to_yaml
from fastmim.engine.distributed import World
from fastmim.resume import Place, choose_place

if TYPE_CHECKING:
    import torch

    from fastmim.data import Source
    from fastmim.data.choice import Choice
    from fastmim.engine import FitResult, RunFolder, Trainer
    from fastmim.evaluation import Score
    from fastmim.methods import Method
    from fastmim.models import Encoder

logger = logging.getLogger("fastmim.train")


def main(argv: list[str]) -> None:
    cfg = parse(argv)
    if cfg.dry_run:
        return rehearse(cfg)
    try:
        world = World.from_environment(cfg.engine.device, cfg.engine.timeout)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with world:
        train(cfg, world)


def train(cfg: TrainConfig, world: World) -> None:
    """The run, in each of its processes; the main one decides the place, measures and writes."""
    place = Place(**world.from_main(lambda: choose_place(cfg).to_dict()))

    from fastmim.data.choice import Choice
    from fastmim.engine import RunFolder
    from fastmim.engine.host_memory import keep_freed_memory
    from fastmim.evaluation import load_encoder

    try:
        if device_of(cfg, world).type == "cpu":
            keep_freed_memory()
        world.share(cfg.batch_size, cfg.optim.accumulate, getattr(cfg.method, "group_size", 1))
        source, method = build(cfg)
        choice = Choice(**world.from_main(lambda: choose(cfg, world, source).to_dict()))
        untrained = copy.deepcopy(method.encoder) if cfg.evaluate else None
    except ValueError as error:  # what does not fit together says so in a sentence
        raise ConfigError(str(error)) from None
    with RunFolder(place.folder, fresh=place.resume == "never", world=world) as run:
        if world.is_main:
            run.write("config.yaml", to_yaml(cfg))
            for line in introduction(cfg, place, source, method):
                logger.info(line)
        try:
            trainer = create_trainer(cfg, place, run, source, method, choice)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        before: dict[str, Score] = {}
        if untrained is not None:
            world.from_main(lambda: before.update(measure(untrained, cfg)))
        result = trainer.fit()

        def finish() -> None:
            after = measure(load_encoder(run.path)[0], cfg) if cfg.evaluate else {}
            conclude(cfg, run, source, result, before, after)

        world.from_main(finish)


def rehearse(cfg: TrainConfig) -> None:
    """All that comes before training, but for the folder."""
    place = choose_place(cfg)
    try:
        source, method = build(cfg)
        choice = choose(cfg, None, source)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    steps_per_epoch = max(1, len(source) // cfg.batch_size)
    steps, rate = cfg.total_steps(steps_per_epoch), cfg.optim.peak_lr(cfg.batch_size)
    print(*introduction(cfg, place, source, method), sep="\n")
    print(f"batch size {cfg.batch_size}, peak learning rate {rate:.3g}, {steps} steps of {steps_per_epoch} an epoch")
    print(f"images are read by {choice.name}" + (f": {choice.reason}" if choice.reason else ""))
    print("Nothing was trained or written (dry_run).")


def build(cfg: TrainConfig) -> tuple["Source", "Method"]:
    """The images, and the method around its encoder with weights drawn from the seed."""
    import torch

    from fastmim.data import create_source
    from fastmim.methods import create_method
    from fastmim.models import create_encoder

    source = create_source(cfg.data)
    if cfg.evaluate and source.labels is None:
        raise ConfigError(f"evaluate: {source.name} {source.unlabelled}")
    torch.manual_seed(cfg.seed)
    encoder = create_encoder(
        str(cfg.model.name),
        img_size=cfg.size,
        patch_size=cfg.model.patch_size,
        in_chans=source.in_chans,
        drop_path_rate=cfg.model.drop_path_rate,
        **cfg.model.kwargs,
    )
    return source, create_method(cfg.method_name, encoder, cfg.method, cfg.size)


def device_of(cfg: TrainConfig, world: World | None) -> "torch.device":
    from fastmim.engine.precision import choose_device

    return choose_device(cfg.engine.device, world.local_rank if world is not None and world.size > 1 else None)


def choose(cfg: TrainConfig, world: World | None, source: "Source") -> "Choice":
    """What reads the images."""
    from fastmim.data.choice import choose_pipeline

    return choose_pipeline(source, cfg.data, "gpu" if device_of(cfg, world).type == "cuda" else "cpu")


def create_trainer(
    cfg: TrainConfig, place: Place, run: "RunFolder", source: "Source", method: "Method", choice: "Choice"
) -> "Trainer":
    from fastmim.data import create_loader
    from fastmim.engine import Trainer

    steps_per_epoch = max(1, len(source) // cfg.batch_size)
    encoder, views, world = method.encoder, method.view_specs(cfg.size), run.world
    return Trainer(
        method,
        lambda step: create_loader(
            source,
            cfg.data,
            cfg.size,
            cfg.batch_size,
            cfg.seed,
            world.rank,
            world.size,
            start_step=step,
            views=views,
            device=device_of(cfg, world),
            choice=choice,
        ),
        run,
        cfg.optim,
        cfg.engine,
        cfg.log,
        batch_size=cfg.batch_size,
        total_steps=cfg.total_steps(steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        seed=cfg.seed,
        mean=source.mean,
        std=source.std,
        meta={
            "method": cfg.method_name,
            "encoder": encoder.name,
            "timm_kwargs": encoder.timm_kwargs,
            "img_size": cfg.size,
            "in_chans": encoder.in_chans,
            "mean": source.mean,
            "std": source.std,
        },
        resume=place.resume,
    )


def measure(encoder: "Encoder", cfg: TrainConfig) -> dict[str, "Score"]:
    from fastmim.engine.injector import inject
    from fastmim.evaluation import probe

    inject("eval")
    return probe(encoder, cfg.data, cfg.size)


def introduction(cfg: TrainConfig, place: Place, source: "Source", method: "Method") -> list[str]:
    """What is about to happen, in lines; the trainer adds device, precision, rate and steps."""
    count = sum(p.numel() for p in method.encoder.parameters())
    height, width = cfg.size
    classes = f"in {len(source.classes)} classes" if source.classes else "without labels"
    lines = [
        f"{cfg.method_name} with {cfg.model.name} ({count / 1e6:.3g} M parameters), images of {height}x{width}",
        f"{source.name}: {len(source)} images {classes}",
    ]
    if cfg.optim.base_lr is not None:
        lines.append(f"rate: {cfg.optim.base_lr:g} per {cfg.optim.lr_per} images, here for {cfg.batch_size}")
    lines.append(f"{'new run in' if place.resume == 'never' else 'continuing'} {place.folder}")
    return lines + [f"changed since then: {line}" for line in place.changed]


def conclude(
    cfg: TrainConfig,
    run: "RunFolder",
    source: "Source",
    result: "FitResult",
    before: dict[str, "Score"],
    after: dict[str, "Score"],
) -> None:
    """What came out, where it lies, what to do next."""
    say = logger.info
    if result.steps:
        say("%d steps in %.0f s, %.0f images/s", result.steps, result.seconds, result.images_per_second)
        say("first -> last logged step: %s", result.course())
    if after:
        say("accuracy of the frozen encoder, untrained -> pre-trained")
        for kind, score in after.items():
            say("  %-6s  %.1f %% -> %.1f %%", kind, before[kind].mean, score.mean)
        scores = {
            name: {k: s.to_dict() for k, s in part.items()} for name, part in (("before", before), ("after", after))
        }
        run.write("evaluation.json", json.dumps(scores, indent=1) + "\n")
    say("pictures     %s", result.picture)
    say("checkpoint   %s", result.checkpoint)
    say("metrics      %s", run.metrics)
    if source.labels is not None and not after:
        root = f" --data.root {cfg.data.root}" if cfg.data.root else ""
        say("judge it:\n  python -m fastmim.evaluate linear --checkpoint %s%s", run.path, root)
    say("next, write the encoder for timm:\n  python -m fastmim.export %s", run.path)


if __name__ == "__main__":
    command(main)
