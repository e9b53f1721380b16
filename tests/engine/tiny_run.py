"""A whole training run of a few seconds: a tiny method and a loader of drawn images around the real trainer.

Also a command, for tests that kill it: python tiny_run.py OUT --total 12 --engine '{"ema": 0.9}' ...
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmim.data import RawBatch
from fastmim.engine import EngineConfig, FitResult, LogConfig, OptimConfig, RunError, RunFolder, Trainer
from fastmim.methods import Batch, Method, Output, Pictures
from fastmim.ops import random_mask
from fastmim.ops.masks import patchify, unpatchify

SIZE, PATCH, IMAGES, BATCH = 16, 4, 40, 8
CELLS = (SIZE // PATCH) ** 2


class TinyEncoder(nn.Module):
    """Batch norm (buffers), dropout (torch's generator), a frozen parameter, and weights to decay or not."""

    def __init__(self, channels: int = 3, norm: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH * channels, 24)
        self.norm = nn.BatchNorm1d(24) if norm else nn.Identity()
        self.drop = nn.Dropout(0.1)
        self.token = nn.Parameter(torch.zeros(1, 1, 24))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def forward(self, patches: Tensor, mask: Tensor) -> Tensor:
        tokens = torch.where(mask.unsqueeze(-1), self.token, self.embed(patches))
        return self.drop(self.norm(tokens.transpose(1, 2)).transpose(1, 2))


class TinyMethod(Method):
    name = "tiny"

    def __init__(self, channels: int = 3, norm: bool = True) -> None:
        super().__init__(TinyEncoder(channels, norm), None, (SIZE, SIZE))  # type: ignore[arg-type]
        self.head = nn.Linear(24, PATCH * PATCH * channels)
        self.seen: list[Tensor] = []  # rng of each forward pass
        self.steps: list[Tensor] = []

    def lr_scales(self) -> dict[str, float]:
        return {"encoder.token": 0.1}

    def after_step(self, step: Tensor) -> None:
        self.steps.append(step.clone())

    def forward(self, batch: Batch) -> Output:
        self.check_images(batch.images)
        self.seen.append(batch.rng.clone())
        mask = random_mask(batch.size, CELLS, CELLS // 4, batch.rng).mask
        patches = patchify(batch.images, PATCH)
        prediction = self.head(self.encoder(patches, mask))
        errors = ((prediction.float() - patches) ** 2).mean(-1)
        loss = (errors * mask).sum() / (batch.size * (CELLS - CELLS // 4))

        def pictures() -> Pictures:
            def pixels(values: Tensor) -> Tensor:
                return unpatchify(values.float(), PATCH, (SIZE, SIZE), batch.images.shape[1])

            hidden = mask.unsqueeze(-1)
            return Pictures(
                batch.images, pixels(patches * ~hidden), pixels(torch.where(hidden, prediction.float(), patches))
            )

        return Output(loss, {"twice": 2 * loss.detach()}, pictures)


class DrawnLoader:
    """Batches that are a function of the step."""

    def __init__(self, step: int = 0, channels: int = 3, uint8: bool = False) -> None:
        self.step, self.channels, self.uint8, self.closed = step, channels, uint8, False
        self.steps_per_epoch = IMAGES // BATCH

    def __iter__(self) -> "DrawnLoader":
        return self

    def __next__(self) -> RawBatch:
        torch.rand(3)  # a loader may draw from the global generator; the run must repeat all the same
        generator = torch.Generator().manual_seed(self.step)
        indices = torch.randint(IMAGES, (BATCH,), generator=generator)
        images = torch.randn(BATCH, self.channels, SIZE, SIZE, generator=generator)
        if self.uint8:
            images = images.mul(50).add(128).clamp(0, 255).to(torch.uint8)
        self.step += 1
        return RawBatch(images, None, indices, self.step // 10)

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]

    def advice(self) -> str:
        return "draw them faster"

    def close(self) -> None:
        self.closed = True


def tiny_trainer(
    run: RunFolder,
    *,
    total: int = 12,
    seed: int = 0,
    resume: str = "auto",
    optim: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    log: Mapping[str, Any] | None = None,
    method: Method | None = None,
    loader: Any = DrawnLoader,
    channels: int = 3,
) -> Trainer:
    if method is None:
        torch.manual_seed(seed)
        method = TinyMethod(channels)
    return Trainer(
        method,
        loader,
        run,
        OptimConfig(**{"lr": 1e-2, "warmup_steps": 3, **(optim or {})}),
        EngineConfig(**{"device": "cpu", "precision": "fp32", "checkpoint_every": 4, **(engine or {})}),
        LogConfig(**{"every": 1, "tensorboard": False, "progress": "none", **(log or {})}),
        batch_size=BATCH,
        total_steps=total,
        steps_per_epoch=IMAGES // BATCH,
        seed=seed,
        mean=[0.5] * channels,
        std=[0.25] * channels,
        meta={"method": "tiny"},
        resume=resume,
    )


def tiny_run(out: str | Path, *, fresh: bool = False, **settings: Any) -> FitResult:
    with RunFolder(out, fresh=fresh) as run:
        return tiny_trainer(run, **settings).fit()


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on time."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--total", type=int, default=12)
    parser.add_argument("--resume", default="auto")
    for key in ("optim", "engine", "log"):
        parser.add_argument(f"--{key}", type=json.loads, default={})
    try:
        tiny_run(**vars(parser.parse_args()))
    except RunError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
