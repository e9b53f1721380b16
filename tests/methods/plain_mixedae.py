"""MixedAE in plain functions over a state dict, one image after another: an independent reading of the paper."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.plain_mae import Weights, blocks, linear, norm, patches_of


def attention(w: Weights, name: str, x: Tensor, heads: int, kept: int | None) -> Tensor:
    """Of one sequence [1 + L, D]; kept: how many patches a patch attends to, None: all."""
    tokens, width = x.shape
    out = []
    qkv = linear(w, f"{name}.qkv", x).reshape(tokens, 3, heads, width // heads)
    for head in range(heads):
        q, k, v = qkv[:, :, head].unbind(1)
        scores = q @ k.T / (width // heads) ** 0.5
        if kept is not None:
            allowed = torch.ones_like(scores, dtype=torch.bool)
            for query in range(1, tokens):
                row = scores[query].tolist()
                order = sorted(range(1, tokens), key=lambda key, row=row: (-row[key], key))
                allowed[query, order[kept:]] = False
            scores = scores.masked_fill(~allowed, float("-inf"))
        out.append(scores.softmax(-1) @ v)
    return linear(w, f"{name}.proj", torch.cat(out, dim=1))


def contrast(tokens: Tensor, owner: Tensor, temperature: float) -> Tensor:
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    scores = (unit @ unit.T / temperature).masked_fill(torch.eye(len(owner), dtype=torch.bool), float("-inf"))
    logs = scores.log_softmax(-1)
    losses = []
    for place in range(len(owner)):
        partners = [p for p in range(len(owner)) if p != place and owner[p] == owner[place]]
        losses.append(-logs[place, partners].mean())
    return torch.stack(losses).mean()


def plain_mixedae_loss(
    w: Weights,
    images: Tensor,
    segments: Tensor,
    *,
    group_size: int,
    heads: int,
    decoder_heads: int,
    homo_layers: tuple[int, ...],
    kept: int,
    temperature: float,
    contrastive_weight: float,
    norm_pix: bool,
) -> Tensor:
    """The loss of a step; segments [B / G, L]."""
    p, q = w["patch_embed.proj.weight"].shape[2:]
    depth = len({name.split(".")[1] for name in w if name.startswith("blocks.")})
    target = patches_of(images, p, q)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    errors, contrasts = [], []
    for group, owner in enumerate(segments):
        sources = images[group * group_size : (group + 1) * group_size]
        embedded = F.conv2d(sources, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=(p, q))
        embedded = embedded.flatten(2).transpose(1, 2)
        x = torch.stack([embedded[image, place] for place, image in enumerate(owner)]) + w["pos_embed"][0, 1:]
        if "segment_embed" in w:
            x = x + w["segment_embed"][owner]
        x = torch.cat((w["cls_token"][0] + w["pos_embed"][0, :1], x))
        for index in range(depth):
            name = f"blocks.{index}"
            topk = kept if index in homo_layers else None
            x = x + attention(w, f"{name}.attn", norm(w, f"{name}.norm1", x), heads, topk)
            x = x + linear(w, f"{name}.mlp.fc2", F.gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x))))
        x = norm(w, "norm", x)
        z = x[1:]
        if "projector.0.weight" in w:
            z = linear(w, "projector.2", F.gelu(linear(w, "projector.0", z)))
        contrasts.append(contrast(z, owner, temperature))
        y = linear(w, "decoder_embed", x)
        for image in range(group_size):
            mine = (owner == image).unsqueeze(-1)
            sequence = torch.cat((y[:1], torch.where(mine, y[1:], w["mask_token"][0]))) + w["decoder_pos_embed"][0]
            decoded = norm(w, "decoder_norm", blocks(w, "decoder_blocks", sequence[None], decoder_heads))
            error = (linear(w, "decoder_pred", decoded)[0, 1:] - target[group * group_size + image]) ** 2
            errors.append(error.mean(-1)[owner != image])
    return torch.cat(errors).mean() + contrastive_weight * torch.stack(contrasts).mean()
