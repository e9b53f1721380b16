import pytest
import torch
from torch.nn import functional as F

from fastmim.models.mae_decoder import restore
from fastmim.ops import decoder_input, random_mask
from fastmim.ops.decoder_input import decoder_input_ref


def make(batch, prefix, kept, patches, width, *, own_tokens=False, dtype=torch.float32, device="cpu"):
    """(visible, mask_token, ids_restore, positions, norm_weight, norm_bias)"""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    ids_restore = torch.rand(batch, patches, generator=generator).argsort(1).to(device)
    token = normal(patches, width) if own_tokens else normal(width)
    return (
        normal(batch, prefix + kept, width), token, ids_restore, normal(prefix + patches, width),
        1 + 0.1 * normal(width), normal(width),
    )  # fmt: skip


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("kept, patches", [(49, 196), (1, 7), (6, 6)])
def test_is_the_decoder_input_of_mae(prefix, kept, patches):
    visible, token, ids_restore, positions, weight, bias = make(3, prefix, kept, patches, 12, dtype=torch.float64)
    x = restore(visible[:, prefix:], token.view(1, 1, -1), ids_restore)
    expected = torch.cat((visible[:, :prefix], x), dim=1) + positions
    sequence, normed = decoder_input(
        visible, token, ids_restore, positions, num_prefix_tokens=prefix, norm_weight=weight, norm_bias=bias
    )
    torch.testing.assert_close(sequence, expected, rtol=0, atol=0)
    torch.testing.assert_close(normed, F.layer_norm(expected, (12,), weight, bias, 1e-6))


def test_takes_the_masks_of_random_mask():
    masks = random_mask(2, 16, 4, torch.tensor([1, 2, 0]))
    visible = masks.ids_keep.unsqueeze(-1).double()  # a token that says where it belongs
    sequence = decoder_input(visible, torch.tensor([-1.0], dtype=torch.float64), masks.ids_restore)
    places = torch.arange(16.0, dtype=torch.float64).expand(2, -1)
    assert torch.equal(sequence[..., 0], places.masked_fill(masks.mask, -1))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("own_tokens", [False, True])
def test_gradients_of_the_reference(own_tokens, norm):
    visible, token, ids_restore, positions, *affine = make(2, 1, 2, 5, 3, own_tokens=own_tokens, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (visible, token, positions, *(affine if norm else ()))]

    def function(visible, token, positions, weight=None, bias=None):
        return decoder_input_ref(visible, token, ids_restore, positions, 1, weight, bias)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"visible": torch.zeros(2, 3)}, r"visible must be \[B, P \+ K, E\], got \[2, 3\]"),
        ({"num_prefix_tokens": 4}, r"4 prefix tokens do not fit visible \[2, 3, 8\]"),
        ({"ids_restore": torch.zeros(3, 6, dtype=torch.int64)}, r"must be int64 \[2, N\], got torch.int64 \[3, 6\]"),
        ({"ids_restore": torch.zeros(2, 6)}, r"must be int64 \[2, N\], got torch.float32"),
        ({"ids_restore": torch.zeros(2, 1, dtype=torch.int64)}, "2 visible patches are more than the 1 places"),
        ({"mask_token": torch.zeros(1, 1, 8)}, r"mask_token must be \[8\] or \[6, 8\].*got \[1, 1, 8\]"),
        ({"positions": torch.zeros(6, 8)}, r"must be \[7, 8\] \(1 prefix tokens and 6 patches\), got \[6, 8\]"),
        ({"norm_bias": torch.zeros(8)}, "norm_bias is given without norm_weight"),
        ({"norm_weight": torch.zeros(7)}, r"norm_weight must be \[8\].*got \[7\]"),
        ({"mask_token": torch.zeros(8, dtype=torch.int64)}, "mask_token must be floating point, got torch.int64"),
        ({"mask_token": torch.zeros(8, device="meta")}, "mask_token is on meta, ids_restore on cpu"),
    ],
)  # fmt: skip
def test_names_what_does_not_fit(change, message):
    visible, token, ids_restore, positions, *_ = make(2, 1, 2, 6, 8)
    arguments = {
        "visible": visible, "mask_token": token, "ids_restore": ids_restore, "positions": positions,
        "num_prefix_tokens": 1,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        decoder_input(**arguments)
