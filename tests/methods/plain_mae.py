"""MAE in plain functions over a state dict with the official names: an independent reading of the paper."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def block(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    batch, tokens, width = x.shape
    qkv = linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x))
    q, k, v = qkv.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1) / (width // heads) ** 0.5).softmax(dim=-1)
    x = x + linear(w, f"{name}.attn.proj", (scores @ v).transpose(1, 2).reshape(batch, tokens, width))
    return x + linear(w, f"{name}.mlp.fc2", F.gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x))))


def blocks(w: Weights, prefix: str, x: Tensor, heads: int) -> Tensor:
    depth = len({name.split(".")[1] for name in w if name.startswith(f"{prefix}.")})
    for index in range(depth):
        x = block(w, f"{prefix}.{index}", x, heads)
    return x


def patches_of(images: Tensor, p: int, q: int) -> Tensor:
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // p, p, width // q, q)
    return torch.einsum("bchpwq->bhwpqc", x).reshape(batch, (height // p) * (width // q), p * q * channels)


def plain_mae_loss(
    w: Weights,
    images: Tensor,
    ids_keep: Tensor,
    ids_restore: Tensor,
    mask: Tensor,
    *,
    heads: int,
    decoder_heads: int,
    norm_pix: bool,
) -> Tensor:
    """The loss of a step. mask: bool [B, N], True = removed."""
    batch = images.shape[0]
    p, q = w["patch_embed.proj.weight"].shape[2:]
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=(p, q)).flatten(2)
    x = x.transpose(1, 2) + w["pos_embed"][:, 1:]
    x = torch.stack([x[i, ids_keep[i]] for i in range(batch)])
    x = torch.cat(((w["cls_token"] + w["pos_embed"][:, :1]).expand(batch, -1, -1), x), dim=1)
    x = linear(w, "decoder_embed", norm(w, "norm", blocks(w, "blocks", x, heads)))
    removed = w["mask_token"].expand(batch, ids_restore.shape[1] - ids_keep.shape[1], -1)
    shuffled = torch.cat((x[:, 1:], removed), dim=1)
    x = torch.cat((x[:, :1], torch.stack([shuffled[i, ids_restore[i]] for i in range(batch)])), dim=1)
    x = norm(w, "decoder_norm", blocks(w, "decoder_blocks", x + w["decoder_pos_embed"], decoder_heads))
    prediction = linear(w, "decoder_pred", x)[:, 1:]
    target = patches_of(images, p, q)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((prediction - target) ** 2).mean(-1)[mask].mean()
