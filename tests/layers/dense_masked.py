"""The definition that whole networks on tiles are held against: the dense network, every layer of it masked.

This is how SparK computes: a dense result times the mask, after every layer that could fill masked positions; norms
take their statistics from visible positions. Written for reading, with hooks on a plain module.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.ops import TileIndex, upsample_mask

CHANNELS_LAST = ("Linear", "PointwiseConv", "LayerNorm")


def visible(tiles: TileIndex, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[B, H, W]: 1 at visible positions."""
    masked = tiles.slots < 0
    return (~upsample_mask(masked, tiles.grid, size)).to(dtype)


def mask_every_layer(module: nn.Module, tiles: TileIndex) -> None:
    """Change `module` into its dense-masked twin for these tiles. Images have to be masked by the caller."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.forward = _batch_norm(layer, tiles)
        elif isinstance(layer, nn.GroupNorm):
            layer.forward = _group_norm(layer, tiles)
        elif isinstance(layer, nn.AvgPool2d):
            layer.forward = _avg_pool(layer, tiles)
        elif isinstance(layer, nn.AdaptiveAvgPool2d) or type(layer).__name__ == "FastAdaptiveAvgPool":
            layer.forward = _global_pool(layer, tiles)
        elif type(layer).__name__ == "SEModule":
            layer.forward = _squeeze_excite(layer, tiles)
        elif not list(layer.children()):
            layer.register_forward_hook(_masks_output(tiles))


def _masks_output(tiles):
    def hook(layer, inputs, output):
        if output.ndim != 4 or output.shape[2] == 1 == output.shape[3]:
            return output
        if type(layer).__name__ in CHANNELS_LAST:
            return output * visible(tiles, tuple(output.shape[1:3]), output.dtype).unsqueeze(3)
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d) or type(layer).__name__ == "LayerNorm2d":
            return output * visible(tiles, tuple(output.shape[2:]), output.dtype).unsqueeze(1)
        return output  # of zero comes zero: activations, identities, drop path

    return hook


def _batch_norm(norm, tiles):
    def forward(x):
        mask = visible(tiles, tuple(x.shape[2:]), x.dtype).unsqueeze(1)  # [B, 1, H, W]
        if not norm.training:
            return mask * F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        count = mask.sum()
        mean = (x * mask).sum((0, 2, 3)) / count
        centred = x - mean[:, None, None]
        variance = (centred.square() * mask).sum((0, 2, 3)) / count
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
            norm.num_batches_tracked.add_(1)
        normal = centred / torch.sqrt(variance + norm.eps)[:, None, None]
        return mask * (normal * norm.weight[:, None, None] + norm.bias[:, None, None])

    return forward


def _group_norm(norm, tiles):
    def forward(x):
        mask = visible(tiles, tuple(x.shape[2:]), x.dtype)[:, None, None]  # [B, 1, 1, H, W]
        groups = x.unflatten(1, (norm.num_groups, -1))  # [B, G, C / G, H, W]
        count = mask.sum((2, 3, 4), keepdim=True) * groups.shape[2]
        mean = (groups * mask).sum((2, 3, 4), keepdim=True) / count
        variance = ((groups - mean).square() * mask).sum((2, 3, 4), keepdim=True) / count
        normal = ((groups - mean) / torch.sqrt(variance + norm.eps)).flatten(1, 2)
        return mask[:, 0] * (normal * norm.weight[:, None, None] + norm.bias[:, None, None])

    return forward


def _avg_pool(pool, tiles):
    def forward(x):
        mask = visible(tiles, tuple(x.shape[2:]), x.dtype).unsqueeze(1)
        total = F.avg_pool2d(x * mask, pool.kernel_size, pool.stride, pool.padding, divisor_override=1)
        count = F.avg_pool2d(mask, pool.kernel_size, pool.stride, pool.padding, divisor_override=1)
        return torch.where(count > 0, total / count.clamp_min(1), 0)

    return forward


def visible_mean(x, tiles):
    """[B, C, H, W] -> [B, C, 1, 1]."""
    mask = visible(tiles, tuple(x.shape[2:]), x.dtype).unsqueeze(1)
    return (x * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)


def _global_pool(pool, tiles):
    def forward(x):
        mean = visible_mean(x, tiles)
        return mean.flatten(1) if getattr(pool, "flatten", False) is True else mean

    return forward


def _squeeze_excite(se, tiles):
    def forward(x):
        return x * se.gate(se.fc2(se.act(se.bn(se.fc1(visible_mean(x, tiles))))))

    return forward
