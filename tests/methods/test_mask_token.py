import pytest
import torch

from fastmim.models.mask_token import MaskToken
from fastmim.models.pixel_head import PixelHead


def features(layout: str) -> torch.Tensor:
    torch.manual_seed(0)
    shape = (2, 6, 5) if layout == "tokens" else (2, 5, 2, 3)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def removed() -> torch.Tensor:
    return torch.tensor([[[1, 0, 0], [0, 1, 1]], [[0, 1, 0], [1, 1, 0]]]).bool()


def spread(value: torch.Tensor, layout: str) -> torch.Tensor:
    return value.view(1, 1, -1) if layout == "tokens" else value.view(1, -1, 1, 1)


@pytest.mark.parametrize("layout", ["tokens", "map"])
@pytest.mark.parametrize(
    "replace, gate, detach", [(True, None, False), (False, None, False), (False, 0.3, False), (False, 0.3, True)]
)
def test_is_the_formula_of_the_paper_with_its_gradients(layout, replace, gate, detach):
    token = MaskToken(5, layout, replace=replace, gate=gate, detach=detach).double()
    x = features(layout)
    m = removed().double().flatten(1).unsqueeze(-1) if layout == "tokens" else removed().double().unsqueeze(1)

    t = token.token.detach().clone().requires_grad_()
    y = x.detach().clone().requires_grad_()
    inner = y.detach() if detach else y
    if replace:
        expected = y * (1 - m) + spread(t, layout) * m
    else:
        scale = 1.0 if gate is None else torch.full_like(t, gate).requires_grad_()
        gated = inner * m * (scale if gate is None else spread(scale, layout))
        expected = y * (1 - m) + gated + spread(t, layout) * m
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()

    out = token(x, removed())
    (out * weight).sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(token.token.grad, t.grad)
    if gate is not None:
        torch.testing.assert_close(token.gate.grad, scale.grad)


def test_keeps_the_dtype_of_the_features():
    token = MaskToken(5, "map", replace=False, gate=1e-6)
    assert token(torch.randn(2, 5, 2, 3).bfloat16(), removed()).dtype == torch.bfloat16


def test_initial_values():
    token = MaskToken(1000, "map", replace=False, gate=1e-6)
    assert token.token.std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(token.gate, torch.full((1000,), 1e-6))
    assert token.token.ndim == token.gate.ndim == 1  # so the optimiser does not decay them


def test_a_gate_on_replaced_features_is_refused():
    with pytest.raises(ValueError, match="nothing for a gate"):
        MaskToken(5, "map", replace=True, gate=1e-6)


def test_head_puts_each_cell_at_its_place():
    head = PixelHead(2, stride=4, out_chans=3)
    assert head[0].bias.abs().max() == 0
    assert head[0].weight.std().item() == pytest.approx(0.02, rel=0.3)
    features = torch.zeros(1, 2, 2, 3)
    features[0, :, 1, 2] = 1.0
    image = head(features)
    assert image.shape == (1, 3, 8, 12)
    assert (image[0, :, 4:, 8:] != 0).all()
    assert image.abs().sum() == image[0, :, 4:, 8:].abs().sum()


def test_heads_have_the_sizes_of_the_paper():
    assert sum(p.numel() for p in PixelHead(2048, 32).parameters()) == pytest.approx(6.29e6, rel=2e-3)  # ResNet-50
