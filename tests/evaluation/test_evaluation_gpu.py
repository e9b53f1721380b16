"""On a GPU the same accuracies come out, up to a few images whose classes were a close call."""

import pytest
import torch

from fastmim.data import DataConfig
from fastmim.evaluation import load_encoder, probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_probe_on_a_gpu_agrees_with_the_cpu(precision):
    encoder, _ = load_encoder("random:vit_tiny_patch16_224", img_size=(32, 32), in_chans=1)
    expected = probe(encoder, DataConfig(), (32, 32), precision="fp32")
    scores = probe(encoder.cuda(), DataConfig(), (32, 32), precision=precision)
    for kind, score in scores.items():
        assert score.mean == pytest.approx(expected[kind].mean, abs=1.0 if precision == "fp32" else 2.0), kind
