"""MixedAE (arXiv 2303.17152) the plain way: embed everything and gather, top-k by a mask, where, repeated sequences."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.mae import Decoder
from benchmarks.baselines.vit import Attention, Block, PlainViT


def topk_attention(attn: Attention, x: Tensor, kept: int) -> Tensor:
    """Each patch attends to the `kept` patches of largest score and to cls; cls attends to everything."""
    batch, tokens, dim = x.shape
    q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.heads, dim // attn.heads).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    patches = scores.detach()[:, :, 1:, 1:]
    removed = torch.zeros_like(scores, dtype=torch.bool)
    removed[:, :, 1:, 1:] = patches < patches.topk(kept, dim=-1).values[..., -1:]
    x = scores.masked_fill(removed, float("-inf")).softmax(dim=-1) @ v
    return attn.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


def contrastive(tokens: Tensor, segments: Tensor, temperature: float) -> Tensor:
    unit = F.normalize(tokens.float(), dim=-1)
    scores = torch.matmul(unit, unit.transpose(1, 2)) / temperature
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=tokens.device)
    positive = (segments[:, :, None] == segments[:, None, :]) & ~itself
    log_probability = scores - scores.masked_fill(itself, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return -((log_probability * positive).sum(dim=-1) / positive.sum(dim=-1)).mean()


class PlainMixedAE(nn.Module):
    """images [B, C, H, W] -> loss. B is divisible by the group size G."""

    def __init__(
        self,
        encoder: PlainViT,
        decoder: Decoder,
        patch_size: tuple[int, int],
        group_size: int,
        *,
        kept: int,
        homo_layers: Collection[int],
        segments: bool,
        projector: bool,
        contrast: tuple[float, float],
        norm_pix: bool,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.patch_size, self.group_size = encoder, decoder, patch_size, group_size
        self.kept, self.homo_layers, self.contrast, self.norm_pix = kept, homo_layers, contrast, norm_pix
        dim = encoder.cls_token.shape[-1]
        self.segment_embed = nn.Parameter(torch.zeros(group_size, dim)) if segments else None
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)) if projector else None

    def patchify(self, images: Tensor) -> Tensor:
        (p, q), (batch, channels, height, width) = self.patch_size, images.shape
        x = images.reshape(batch, channels, height // p, p, width // q, q)
        return torch.einsum("nchpwq->nhwpqc", x).reshape(batch, -1, p * q * channels)

    def mixing_map(self, groups: int, length: int, device: torch.device, noise: Tensor | None) -> Tensor:
        """[B / G, L]: positions in the order of the noise, cut into G equal parts."""
        order = torch.argsort(torch.rand(groups, length, device=device) if noise is None else noise, dim=1, stable=True)
        parts = torch.arange(self.group_size, device=device).repeat_interleave(length // self.group_size)
        return torch.empty_like(order).scatter_(1, order, parts.expand(groups, -1))

    def block(self, index: int, block: Block, x: Tensor) -> Tensor:
        if index not in self.homo_layers:
            return block(x)
        x = x + block.ls1(topk_attention(block.attn, block.norm1(x), self.kept))
        return x + block.ls2(block.mlp(block.norm2(x)))

    def encode(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        encoder = self.encoder
        assert encoder.pos_embed is not None
        x = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        length, dim = x.shape[1:]
        segments = self.mixing_map(x.shape[0] // self.group_size, length, images.device, noise)
        x = x.reshape(-1, self.group_size, length, dim)
        x = torch.gather(x, 1, segments[:, None, :, None].expand(-1, 1, -1, dim)).squeeze(1)
        if self.segment_embed is not None:
            x = x + self.segment_embed[segments]
        x = torch.cat(((encoder.cls_token + encoder.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x), dim=1)
        for index, block in enumerate(encoder.blocks):
            x = self.block(index, block, x)
        return encoder.norm(x), segments

    def decode(self, latent: Tensor, shown: Tensor) -> Tensor:
        """shown: [B, L], where an image shows in its mixed sequence."""
        decoder = self.decoder
        x = decoder.decoder_embed(latent).repeat_interleave(self.group_size, dim=0)
        patches = torch.where(shown.unsqueeze(-1), x[:, 1:], decoder.mask_token.to(x.dtype))
        x = torch.cat((x[:, :1], patches), dim=1) + decoder.decoder_pos_embed
        for block in decoder.decoder_blocks:
            x = block(x)
        return decoder.decoder_pred(decoder.decoder_norm(x))[:, 1:]

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        latent, segments = self.encode(images, noise)
        shown = (segments[:, None] == torch.arange(self.group_size, device=images.device)[:, None]).flatten(0, 1)
        prediction, target, mask = self.decode(latent, shown), self.patchify(images), (~shown).float()
        if self.norm_pix:
            mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        loss = (((prediction.float() - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()
        weight, temperature = self.contrast
        if weight == 0:
            return loss
        tokens = latent[:, 1:] if self.projector is None else self.projector(latent[:, 1:])
        return loss + weight * contrastive(tokens, segments, temperature)
