"""MAE (arXiv 2111.06377) the plain way: argsort masks, gathers, a target tensor of all patches."""

import torch
from torch import Tensor, nn

from benchmarks.baselines.masking import shuffle
from benchmarks.baselines.vit import Block, PlainViT


class Decoder(nn.Module):
    def __init__(self, encoder_dim: int, patches: int, values: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(dim, heads, 4 * dim) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, values)

    def forward(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(x)
        missing = ids_restore.shape[1] + 1 - x.shape[1]
        patches = torch.cat((x[:, 1:], self.mask_token.to(x.dtype).repeat(x.shape[0], missing, 1)), dim=1)
        patches = torch.gather(patches, 1, ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat((x[:, :1], patches), dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


class PlainMAE(nn.Module):
    """images [B, C, H, W] -> loss."""

    def __init__(
        self, encoder: PlainViT, decoder: Decoder, patch_size: tuple[int, int], keep: int, norm_pix: bool
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.patch_size = patch_size
        self.keep = keep
        self.norm_pix = norm_pix

    def patchify(self, images: Tensor) -> Tensor:
        (p, q), (batch, channels, height, width) = self.patch_size, images.shape
        x = images.reshape(batch, channels, height // p, p, width // q, q)
        return torch.einsum("nchpwq->nhwpqc", x).reshape(batch, -1, p * q * channels)

    def encode(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        encoder = self.encoder
        assert encoder.pos_embed is not None
        x = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        batch, patches, dim = x.shape
        ids_shuffle, ids_restore = shuffle(batch, patches, images.device, noise)
        x = torch.gather(x, 1, ids_shuffle[:, : self.keep].unsqueeze(-1).repeat(1, 1, dim))
        mask = torch.ones(batch, patches, device=images.device)
        mask[:, : self.keep] = 0
        mask = torch.gather(mask, 1, ids_restore)
        x = torch.cat(((encoder.cls_token + encoder.pos_embed[:, :1]).expand(batch, -1, -1), x), dim=1)
        for block in encoder.blocks:
            x = block(x)
        return encoder.norm(x), mask, ids_restore

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        latent, mask, ids_restore = self.encode(images, noise)
        prediction = self.decoder(latent, ids_restore)
        target = self.patchify(images)
        if self.norm_pix:
            mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        loss = ((prediction.to(target.dtype) - target) ** 2).mean(dim=-1)  # [B, N]
        return (loss * mask).sum() / mask.sum()
