"""A training step of MixedAE against one of MAE by this same package: what mixing, recognition and contrast cost.

Both decode the same number of images; the encoder of MAE sees 49 patches of each, that of MixedAE sequences of 196.
"""

from collections.abc import Iterator

import torch

from benchmarks.runner import Case, Settings, Side
from benchmarks.throughput import our_step, resident_bytes
from fastmim.methods import create_method
from fastmim.models import create_encoder

MODEL = "vit_base_patch16_224"


def cases(settings: Settings) -> Iterator[Case]:
    side, batch, options = 224, 8 if settings.device.type == "cpu" else 256, {}
    if settings.quick:
        side, batch, options = 32, 4, {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    for dtype in settings.dtypes:
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype)
        if precision is None:
            continue
        sides = {}
        for name in ("mixedae", "mae"):
            torch.manual_seed(0)
            encoder = create_encoder(MODEL, img_size=side, **options)
            method = create_method(name, encoder, None, side).to(settings.device).train()
            label = "auto" if name == "mixedae" else "MAE by fastmim"
            sides[name] = Side(label, our_step(method, precision, batch), resident_bytes(method))
        yield Case(
            op="mixedae_step",
            case=f"{MODEL} {side}px B{batch} G4",
            candidate=sides["mixedae"],
            baseline=sides["mae"],
            inputs=lambda: (torch.randn(batch, 3, side, side, device=settings.device),),
            dtype=dtype,
            passes=("step",),
            images=batch,
        )
