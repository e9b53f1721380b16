"""Training on tiles is training on dense maps times the mask: the same losses, step after step."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmim.methods import Method, create_method
from fastmim.methods.fcmae import FCMAEConfig
from fastmim.methods.spark import SparKConfig
from fastmim.ops import Masks
from tests.methods import test_fcmae, test_spark
from tests.methods.encoders import small_convnextv2, small_resnet
from tests.methods.masked_cnn import draw

Loss = Callable[[Method, Tensor, Masks], Tensor]


def losses(method: Method, loss_of: Loss, images: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    curve = []
    for step in range(steps):
        loss = loss_of(method, images, draw(method, images.shape[0], step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize(
    "name, encoder, cfg, plain, steps",
    [
        ("fcmae", small_convnextv2, FCMAEConfig(decoder_dim=16), test_fcmae.plain_loss, 200),
        ("spark", small_resnet, SparKConfig(decoder_width=32), test_spark.plain_loss, 20),
    ],
    ids=["fcmae", "spark"],
)
def test_loss_curves_are_the_same(name, encoder, cfg, plain, steps):
    torch.manual_seed(0)
    method = create_method(name, encoder(), cfg, (64, 96)).double().train()
    coarse = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    images = torch.nn.functional.interpolate(coarse, size=(64, 96), mode="bilinear")
    expected = losses(copy.deepcopy(method), plain, images, steps)
    curve = losses(method, lambda m, x, masks: m.predict_removed(x, masks).loss, images, steps)
    assert curve == pytest.approx(expected, rel=1e-5)
    assert curve[-1] < curve[0]
