"""MAE's decoder: mask tokens join the encoded visible patches, and a narrow ViT turns all into pixels.

Legend: B batch, K visible patches, N all patches, D encoder width, d decoder width, P = p*q*C values of a patch.
"""

import torch
from torch import Tensor, nn

from fastmim.models.positions import sincos_positions
from fastmim.models.transformer import NORM_EPS, block


class MAEDecoder(nn.Module):
    """Linear D -> d, mask tokens, un-shuffle, fixed sin-cos positions, pre-norm blocks, norm, Linear d -> P.

    Keys are the official ones: decoder_embed, mask_token, decoder_pos_embed, decoder_blocks, decoder_norm and
    decoder_pred.

    Args:
        encoder_dim: D.
        grid: (rows, columns) of patches.
        patch_values: P.
        num_prefix_tokens: tokens before the patches in the encoder's output (cls, registers); they are decoded too and
            dropped at the end.
        dim, depth, num_heads: of the blocks; d divisible by 4 (positions) and by num_heads.

    Source: arXiv 2111.06377, section 3 and appendix A.1.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        patch_values: int,
        *,
        num_prefix_tokens: int = 1,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        if dim % 4 or dim % num_heads:
            raise ValueError(
                f"MAEDecoder: a width of {dim} must be divisible by 4 (sin-cos positions) and by its {num_heads} heads."
            )
        self.num_prefix_tokens = num_prefix_tokens
        self.decoder_embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sincos_positions(dim, grid, num_prefix_tokens)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(block(dim, num_heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(dim, patch_values)
        self.apply(init_mae_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """latent: [B, prefix + K, D]; ids_restore: [B, N]. Returns [B, N, P]."""
        x = self.decoder_embed(latent)
        prefix, visible = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        x = torch.cat((prefix, restore(visible, self.mask_token.to(x.dtype), ids_restore)), dim=1)
        x = x + self.decoder_pos_embed.to(x.dtype)
        for layer in self.decoder_blocks:
            x = layer(x)
        return self.decoder_pred(self.decoder_norm(x[:, self.num_prefix_tokens :]))


def restore(visible: Tensor, mask_token: Tensor, ids_restore: Tensor) -> Tensor:
    """Visible tokens [B, K, d] at their places among mask tokens [1, 1, d]: [B, N, d]."""
    kept, total = visible.shape[1], ids_restore.shape[1]
    shuffled = torch.cat((visible, mask_token.expand(visible.shape[0], total - kept, -1)), dim=1)
    return shuffled.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, visible.shape[-1]))


def init_mae_linear(module: nn.Module) -> None:
    """The official initialisation of a module: Linear xavier-uniform with zero bias, LayerNorm 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
