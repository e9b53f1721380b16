"""What plain vision transformers are made of, with timm's module names.

Legend: B batch, N = gh * gw patches, K visible patches, D width, C image channels, p patch side.
"""

from functools import partial

from torch import Tensor, nn

from fastmim.layers import FusedBlock
from fastmim.ops import visible_patch_embed

NORM_EPS = 1e-6
norm_layer = partial(nn.LayerNorm, eps=NORM_EPS)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: one linear map of each patch's pixels."""

    def __init__(self, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        if img_size[0] % patch_size[0] or img_size[1] % patch_size[1]:
            raise ValueError(
                f"img_size {img_size[0]} x {img_size[1]} is not divisible by patch_size "
                f"{patch_size[0]} x {patch_size[1]}"
            )
        self.img_size = img_size
        self.patch_size = patch_size
        self.grid_size = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Tokens [B, N, D], row-major; of the patches `ids_keep` [B, K] alone [B, K, D], the pixels of the others are
        then not read. positions [N, D] are added to the tokens of their patches."""
        return visible_patch_embed(images, ids_keep, self.proj.weight, self.proj.bias, positions)


def block(
    dim: int,
    num_heads: int,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    init_values: float | None = None,
    drop_path: float = 0.0,
) -> FusedBlock:
    """A pre-norm block with the norms of ViTs."""
    return FusedBlock(
        dim,
        num_heads,
        mlp_ratio,
        qkv_bias=qkv_bias,
        init_values=init_values,
        drop_path=drop_path,
        norm_layer=norm_layer,
    )


def init_linear(module: nn.Module) -> None:
    """timm's initialisation of linear layers: truncated normal of width 0.02, zero bias. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
