"""What SparK, FCMAE and A²MIM on tiles are held against: the dense encoder, every layer of it times the mask."""

import copy

import torch
from torch import Tensor, nn

from fastmim.layers import stage_names
from fastmim.methods import Method
from fastmim.ops import Masks, TileIndex, random_mask, upsample_mask
from tests.layers.dense_masked import mask_every_layer


def draw(method: Method, batch: int = 2, step: int = 5) -> Masks:
    return random_mask(batch, method.num_cells, method.num_keep, torch.tensor([3, step, 0]))


def wake(method: Method) -> Method:
    """Every parameter away from its start, where scales, shifts and residual branches of zero would hide mistakes."""
    generator = torch.manual_seed(4)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return method


def removed_of(masks: Masks, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """bool [B, 1, H, W], True = removed."""
    return upsample_mask(masks.mask, grid, size).unsqueeze(1)


def masked_stages(encoder: nn.Module, images: Tensor, masks: Masks, grid: tuple[int, int], names=None) -> list[Tensor]:
    """Outputs [B, C, h, w] of stages, zero at removed cells. `encoder` is changed: give a copy that shares weights."""
    stages: list[Tensor] = []
    mask_every_layer(encoder, TileIndex.from_ids_keep(masks.ids_keep, grid))
    for name in names or stage_names(encoder):
        encoder.get_submodule(name).register_forward_hook(lambda module, inputs, output: stages.append(output))
    encoder.forward_map(images * ~removed_of(masks, grid, tuple(images.shape[2:])))  # type: ignore[operator]
    return stages


def twin(encoder: nn.Module) -> nn.Module:
    """A copy with the same parameter objects, so that gradients meet in one place."""
    memo = {id(parameter): parameter for parameter in encoder.parameters()}
    return copy.deepcopy(encoder, memo)


def normalised_patches(images: Tensor, side: int) -> Tensor:
    """[B, N, side*side*C], row, column, channel; each patch with mean 0 and unbiased variance 1."""
    batch, channels, height, width = images.shape
    cells = images.reshape(batch, channels, height // side, side, width // side, side)
    patches = torch.einsum("bchpwq->bhwpqc", cells).reshape(batch, -1, side * side * channels)
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def assert_same_loss_and_gradients(method: Method, ours: Tensor, plain: Tensor) -> None:
    """Values to 1e-6 (the loss is fp32), gradients of all trained parameters to 1e-6 of their size."""
    torch.testing.assert_close(ours.double(), plain.detach(), rtol=1e-6, atol=0)
    named = [(n, p) for n, p in method.named_parameters() if not n.startswith(("encoder.head", "encoder.fc"))]
    values = [parameter for _, parameter in named]
    gradients = (torch.autograd.grad(loss, values, allow_unused=True) for loss in (ours, plain))
    for (name, _), gradient, expected in zip(named, *gradients, strict=True):
        if expected is None:
            assert gradient is None or not gradient.any(), name
            continue
        scale = expected.abs().max().clamp(min=1e-8).item()
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 * scale, msg=lambda text, n=name: n + text)
