"""MixedAE learns to find what belongs together, on real photographs."""

import numpy as np
import pytest
import torch

from fastmim.data.photos import photographs, regions
from fastmim.methods import Batch, create_method
from fastmim.methods.mixedae import MixedAEConfig
from fastmim.models import create_encoder

pytestmark = pytest.mark.slow  # 900 training steps: recognition takes that long to leave chance for good
pytest.importorskip("skimage")

STEPS, BATCH, SIDE = 900, 16, 32


def tiles() -> torch.Tensor:
    """The 272 regions of photographs at 32 pixels, normalised."""
    pixels = [np.asarray(part.resize((SIDE, SIDE))) for photo in photographs().values() for part in regions(photo)]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)


def test_recognition_rises_above_chance_while_reconstruction_falls():
    torch.manual_seed(2)
    sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 96, "depth": 3, "num_heads": 3}
    cfg = MixedAEConfig(
        segment_embedding="none", contrastive_weight=1.0, temperature=0.1, decoder_dim=32, decoder_depth=1
    )
    method = create_method("mixedae", create_encoder("vit_tiny_patch16_224", **sizes), cfg, SIDE).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    images, order, course = tiles(), torch.Generator().manual_seed(2), []
    for step in range(STEPS):
        chosen = torch.randperm(len(images), generator=order)[:BATCH]
        output = method(Batch(images[chosen], torch.tensor([2, step, 0])))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        course.append(torch.stack([output.parts[name] for name in ("recognition", "loss_reconstruction")]))
    chance = output.parts["recognition_chance"].item()
    (first, start), (last, end) = (torch.stack(part).mean(0).tolist() for part in (course[:20], course[-100:]))
    assert first < 1.15 * chance
    assert last > 1.25 * chance, f"recognition went from {first:.3f} to {last:.3f}, chance is {chance:.3f}"
    assert end < 0.6 * start, f"reconstruction went from {start:.3f} to {end:.3f}"
