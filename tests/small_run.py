"""A run folder as training leaves it, with an encoder small enough for tests."""

from pathlib import Path

import torch

from fastmim.engine.checkpoint import CheckpointStore
from fastmim.models import Encoder, create_encoder

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "in_chans": 1}
MEAN, STD = (0.3,), (0.4,)


def small_encoder(seed: int = 3) -> Encoder:
    torch.manual_seed(seed)
    return create_encoder("vit_tiny_patch16_224", **SMALL_VIT)


def write_run(
    folder: Path, *, steps: tuple[int, ...] = (5, 10), ema: bool = False, encoder: Encoder | None = None
) -> Path:
    """A run with a checkpoint at each of `steps`; the last holds `small_encoder(seed=the step)` (ema: seed + 1)."""
    store = CheckpointStore(folder / "checkpoints")
    store.folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    for step in steps:
        groups = {"method": encoder or small_encoder(step)} | ({"ema": small_encoder(step + 1)} if ema else {})
        tensors = {
            name: {f"encoder.{key}": value for key, value in module.state_dict().items()} | {"decoder.w": torch.ones(2)}
            for name, module in groups.items()
        }
        built = groups["method"]
        meta = {
            "method": "mae",
            "encoder": built.name,
            "timm_kwargs": built.timm_kwargs,
            "img_size": [32, 32],
            "in_chans": built.in_chans,
            "mean": MEAN,
            "std": STD,
        }
        store.save(step, tensors, {"meta": meta})
    return folder
