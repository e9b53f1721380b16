import pytest
import torch

from fastmim.layers import FusedAttention, HomologousAttention
from fastmim.ops import mixing_map


def make(**options):
    """(layer with random weights, tokens [2, 1 + 16, 64], segments [2, 16])"""
    torch.manual_seed(0)
    layer = HomologousAttention(64, 2, qkv_bias=True, **options)
    return layer, torch.randn(2, 17, 64), mixing_map(2, 4, 16, torch.tensor([1, 2, 0])).segments


def test_with_all_keys_it_is_plain_attention_with_the_same_keys():
    layer, x, _ = make(topk_ratio=1.0)
    plain = FusedAttention(64, 2, qkv_bias=True)
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = x.requires_grad_()
    ours, expected = layer(x), plain(x)
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(make(mode="global")[0](x), expected)


def test_one_key_gives_the_value_of_the_best_key_and_of_cls():
    layer, x, _ = make(topk_ratio=1 / 16)
    q, k, v = layer.project(x).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * layer.scale
    best = scores[:, :, 1:, 1:].argmax(-1, keepdim=True) + 1
    pair = torch.cat((scores[:, :, 1:, :1], scores[:, :, 1:].gather(-1, best)), dim=-1).softmax(-1)
    values = v.transpose(1, 2)
    chosen = values.gather(2, best.expand(-1, -1, -1, 32))
    expected = pair[..., :1] * values[:, :, :1] + pair[..., 1:] * chosen
    out = layer.proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x)[:, 1:], out, rtol=1e-4, atol=1e-5)


def test_cls_attends_to_everything():
    layer, x, _ = make()
    plain = FusedAttention(64, 2, qkv_bias=True)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x)[:, 0], plain(x)[:, 0])
    assert not torch.allclose(layer(x)[:, 1:], plain(x)[:, 1:], atol=1e-3)


def test_random_projections_recognise_nothing():
    torch.manual_seed(0)
    layer = HomologousAttention(96, 3, topk_ratio=0.25)
    segments = mixing_map(16, 4, 196, torch.tensor([1, 2, 0])).segments
    out, share = layer.measure(torch.randn(16, 197, 96), segments)
    assert share.item() == pytest.approx((49 - 1) / (196 - 1), abs=0.01)  # 0.246
    assert out.shape == (16, 197, 96)


def test_keys_that_tell_the_images_apart_recognise_everything():
    layer, x, segments = make()
    with torch.no_grad():
        layer.qkv.weight.zero_()
        layer.qkv.bias.zero_()
        for row in range(64):
            layer.qkv.weight[row, row % 4] = layer.qkv.weight[64 + row, row % 4] = 1.0  # queries = keys = the segment
        x[:, 1:, :4] = 5 * torch.nn.functional.one_hot(segments, 4).float()
    out, share = layer.measure(x, segments)
    assert share.item() == 1.0
    oracle, _, _ = make(mode="oracle")
    oracle.load_state_dict(layer.state_dict())
    torch.testing.assert_close(out, oracle(x, segments))
    assert oracle.measure(x, segments)[1] is None


def test_oracle_needs_to_be_told():
    layer, x, _ = make(mode="oracle")
    with pytest.raises(ValueError, match="'oracle' needs segments"):
        layer(x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "best"}, "one of topk, oracle, global, got 'best'"),
        ({"topk_ratio": 0.0}, r"in \(0, 1\]; got 0.0"),
        ({"attn_drop": 0.1}, "attn_drop is 0.1"),
    ],
)
def test_names_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        HomologousAttention(64, 2, **options)
