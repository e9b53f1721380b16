"""mask_token_attention: the plain attention over the assembled sequence, forward and backward, to rounding in fp64."""

import pytest
import torch
from torch import nn

from fastmim.layers import FusedAttention, FusedBeitAttention, mask_token_attention
from fastmim.layers.mask_token_attention import collapsed_bias
from fastmim.layers.row_index import inverse_permutation, take_rows
from fastmim.ops import decoder_input, random_mask

WIDTH, HEADS, PATCHES = 24, 3, 12
KINDS = [
    lambda: FusedAttention(WIDTH, HEADS, qkv_bias=True),
    lambda: FusedAttention(WIDTH, HEADS, qk_norm=True, gated=True, norm_layer=nn.LayerNorm),
    lambda: FusedBeitAttention(WIDTH, HEADS, qkv_bias=True),
]


def build(kind=0, prefix=1, keep=4, own_tokens=False, biased=False):
    torch.manual_seed(0)
    norm, attn = nn.LayerNorm(WIDTH).double(), KINDS[kind]().double()
    for parameter in (*norm.parameters(), *attn.parameters()):
        nn.init.normal_(parameter, std=0.4)
    masks = random_mask(3, PATCHES, keep, torch.tensor([1, 2, 3]))
    tokens = prefix + PATCHES
    leaves = {
        "visible": torch.randn(3, prefix + keep, WIDTH, dtype=torch.float64),
        "mask_token": torch.randn(*((PATCHES, WIDTH) if own_tokens else (WIDTH,)), dtype=torch.float64),
        "bias": torch.randn(1, HEADS, tokens, tokens, dtype=torch.float64) if biased else None,
    }
    return norm, attn, masks.ids_restore, {k: None if v is None else v.requires_grad_() for k, v in leaves.items()}


def plain(norm, attn, visible, mask_token, ids_restore, prefix, bias):
    sequence = decoder_input(visible, mask_token, ids_restore, num_prefix_tokens=prefix, backend="reference")
    return attn(norm(sequence), bias)


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("prefix, keep", [(1, 4), (0, 1), (2, 11)])
@pytest.mark.parametrize(
    "own_tokens, biased, collapse",
    [(True, False, False), (True, True, False), (False, False, False), (False, False, True), (False, True, True)],
)
def test_equals_the_plain_attention_with_every_gradient(kind, prefix, keep, own_tokens, biased, collapse):
    norm, attn, ids_restore, leaves = build(kind, prefix, keep, own_tokens, biased)
    found = mask_token_attention(
        norm,
        attn,
        leaves["visible"],
        leaves["mask_token"],
        ids_restore,
        num_prefix_tokens=prefix,
        bias=leaves["bias"],
        collapse_keys=collapse,
    )
    expected = plain(norm, attn, leaves["visible"], leaves["mask_token"], ids_restore, prefix, leaves["bias"])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    inputs = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    inputs |= {f"norm.{n}": p for n, p in norm.named_parameters()} | {
        f"attn.{n}": p for n, p in attn.named_parameters()
    }
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, inputs.values(), weight) for out in (found, expected)]
    for name, ours, right in zip(inputs, *gradients, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_rows_of_removed_positions_are_computed_once():
    norm, attn, ids_restore, leaves = build(own_tokens=True)
    rows = []
    attn.qkv.register_forward_hook(lambda _, x, __: rows.append(x[0].numel() // WIDTH))
    mask_token_attention(norm, attn, leaves["visible"], leaves["mask_token"], ids_restore, num_prefix_tokens=1)
    assert rows == [3 * 5, PATCHES]


def test_keys_that_differ_are_not_collapsed():
    norm, attn, ids_restore, leaves = build(own_tokens=True)
    with pytest.raises(ValueError, match=r"vectors of their own \(mask_token \[12, 24\]\) are not one key"):
        mask_token_attention(
            norm, attn, leaves["visible"], leaves["mask_token"], ids_restore, num_prefix_tokens=1, collapse_keys=True
        )


def test_a_bias_that_shuts_out_all_removed_keys_gives_finite_numbers():
    _, _, ids_restore, _ = build()
    bias = torch.zeros(1, HEADS, 13, 13, dtype=torch.float64)
    bias[..., 1:] = -2000.0
    bias.requires_grad_()
    joined = collapsed_bias(bias, ids_restore, 4, 1)
    joined.exp().sum().backward()
    assert (joined[..., -1] < -700).all()
    assert bias.grad.isfinite().all()


def test_rows_are_taken_and_gradients_put_back():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[4, 0], [1, 2]])
    assert torch.equal(take_rows(x, ids), torch.stack((x[0, [4, 0]], x[1, [1, 2]])))
    assert torch.autograd.gradcheck(lambda x: take_rows(x, ids), x)
    assert torch.autograd.gradgradcheck(lambda x: take_rows(x, ids), x)


def test_inverse_of_a_shuffle():
    ids = torch.rand(4, 9).argsort(1)
    assert torch.equal(inverse_permutation(ids), ids.argsort(1))
