"""What `VisionTransformer` and `Beit` share: patches -> [prefix | patches] with positions -> blocks -> norm -> pool.

Legend: B batch, N = gh * gw patches, K visible patches, P prefix tokens (cls, registers), T = P + N, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmim.layers import FusedBeitBlock, FusedBlock, mask_token_attention
from fastmim.layers.mask_token_attention import assemble
from fastmim.models.encoder import Encoder, InsertFunction, Insertion, pair
from fastmim.models.transformer import NORM_EPS, PatchEmbed

POOLING = ("", "token", "avg")
RunBlock = Callable[[int, nn.Module, Tensor], Tensor]


class TokenEncoder(Encoder):
    """Base of transformers over square or rectangular patch grids of a fixed size."""

    cls_token: nn.Parameter | None
    reg_token: nn.Parameter | None
    pos_embed: nn.Parameter | None
    no_embed_class: bool = False  # True: positions for patches only
    blocks: nn.ModuleList
    norm: nn.Module
    fc_norm: nn.Module
    head: nn.Module

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        num_heads: int,
        num_prefix_tokens: int,
    ) -> None:
        super().__init__()
        if global_pool not in POOLING:
            raise ValueError(f"global_pool is one of {', '.join(map(repr, POOLING))}, but was given {global_pool!r}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.patch_embed = PatchEmbed(pair(img_size, "img_size"), pair(patch_size, "patch_size"), in_chans, embed_dim)
        self.img_size, self.patch_size = self.patch_embed.img_size, self.patch_embed.patch_size
        self.grid_size = self.patch_embed.grid_size
        self.stride = max(self.patch_size)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = num_prefix_tokens

    def _build_head(self, norm_after_pool: bool) -> None:
        """The last norm acts on all tokens, or (`norm_after_pool`) on the pooled features only, as timm places it."""
        final = nn.LayerNorm(self.embed_dim, eps=NORM_EPS)
        self.norm, self.fc_norm = (nn.Identity(), final) if norm_after_pool else (final, nn.Identity())
        self.head = nn.Linear(self.embed_dim, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens [B, P + N, D] after the final norm (which models with `fc_norm` apply after pooling instead)."""
        self._check_images(images)
        return self._encode(images)

    def forward_visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Encode the visible patches only; the pixels of the others are not read.

        Args:
            images: [B, in_chans, H, W].
            ids_keep: [B, K] int64, row-major patch positions in [0, N), in any order.

        Returns:
            [B, P + K, D], the patches in the order of `ids_keep`, after the final norm.
        """
        self._check_images(images)
        if ids_keep.ndim != 2 or ids_keep.shape[0] != images.shape[0]:
            raise ValueError(
                f"{self._label}: forward_visible expects ids_keep [{images.shape[0]}, K] for images "
                f"{list(images.shape)}, but was given {list(ids_keep.shape)}"
            )
        return self._encode(images, ids_keep)

    def forward_visible_maps(self, images: Tensor, ids_keep: Tensor) -> list[Tensor]:
        """What `forward_visible` passes through: embedded tokens, the output of each block, the last after the norm.

        Returns:
            1 + depth tensors [B, P + K, D].
        """
        self._check_images(images)
        x = self._with_prefix(self.patch_embed(images, ids_keep, self.patch_positions()))
        context, maps = self._block_context(ids_keep), [x]
        for block in self.blocks:
            maps.append(block(maps[-1], *context))
        return [*maps[:-1], self.norm(maps[-1])]

    def forward_map(self, images: Tensor, insert: InsertFunction | None = None, at: int | None = None) -> Tensor:
        """Patch tokens after the final norm as a map [B, D, gh, gw].

        `insert` acts on the patch tokens [B, N, D]: right after the patch embedding, before prefix tokens and
        positions, for `at=0` (the default); before block `at` otherwise. Prefix tokens never pass through it.
        """
        self._check_images(images)
        index = self._insertion_index(at, len(self.blocks), default=0)
        return self._map(self._encode(images, insert=insert, at=index))

    def forward_replaced(
        self,
        images: Tensor,
        token: Tensor,
        ids_keep: Tensor,
        ids_restore: Tensor,
        *,
        collapse_keys: bool | None = None,
    ) -> Tensor:
        """`forward_map` of patch tokens that `token` replaces, right after the patch embedding, where they are removed.

        The pixels of removed patches are not read, and what the first block computes of them before attention is
        computed once for all that are equal: once per position, or once in all without absolute positions.

        Args:
            images: [B, in_chans, H, W].
            token: [D], or [B, 1, D] where each image has its own.
            ids_keep: [B, K] int64, the visible patches.
            ids_restore: [B, N] int64, the place of each patch in `ids_keep`, or K and more where it is removed; a
                permutation in each image.
            collapse_keys: let one key stand for all removed patches in the first attention. Refused with absolute
                positions. None does so where there is no relative bias either: gathering the bias for each image costs
                more than the keys.

        Returns:
            [B, D, gh, gw].
        """
        self._check_images(images)
        prefix, positions, context = self.num_prefix_tokens, self.patch_positions(), self._block_context(None)
        visible = self._with_prefix(self.patch_embed(images, ids_keep, positions))
        x = assemble(visible, token, ids_restore, prefix, positions)
        first = self.blocks[0]
        assert isinstance(first, FusedBlock | FusedBeitBlock)
        if positions is not None and token.dim() == 1:
            token = token + positions
        if positions is None or token.dim() == 2:
            if collapse_keys is None and positions is not None:
                collapse_keys = False
            settings = {"num_prefix_tokens": prefix, "collapse_keys": collapse_keys}
            x = first.run(_attend_once, x, visible, token, ids_restore, context, **settings)
        else:  # each removed position of each image has a vector of its own
            x = first(x, *context)
        for block in self.blocks[1:]:
            x = block(x, *context)
        return self._map(self.norm(x))

    def insertion(self, at: int | None = None) -> Insertion:
        """Tokens of the patches, the same at every block."""
        self._insertion_index(at, len(self.blocks), default=0)
        if self.patch_size[0] != self.patch_size[1]:
            raise ValueError(
                f"{self._label}: cells of {self.patch_size[0]} x {self.patch_size[1]} pixels have no single stride; "
                f"inserting a mask token needs square patches"
            )
        return Insertion(self.embed_dim, self.stride, "tokens")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens [B, P + N, D] to [B, D] (or keep them, for `global_pool=""`), then norm and classifier."""
        if self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        elif self.global_pool == "token":
            x = x[:, 0]
        x = self.fc_norm(x)
        return x if pre_logits else self.head(x)

    def no_weight_decay(self) -> set[str]:
        """Tokens and positions that this encoder has."""
        return {name for name in ("pos_embed", "cls_token", "reg_token") if getattr(self, name) is not None}

    def encode_patches(self, patches: Tensor, run_block: RunBlock | None = None) -> Tensor:
        """From embedded patches on: prefix tokens in front, blocks, final norm.

        Args:
            patches: [B, n, D], with their positions (`patch_positions`) added.
            run_block: run_block(index, block, x) takes the place of block(x); not for encoders whose blocks receive
                more than tokens.

        Returns:
            [B, P + n, D].
        """
        x = self._with_prefix(patches)
        for index, block in enumerate(self.blocks):
            x = block(x) if run_block is None else run_block(index, block, x)
        return self.norm(x)

    def _encode(
        self, images: Tensor, ids_keep: Tensor | None = None, insert: InsertFunction | None = None, at: int = 0
    ) -> Tensor:
        positions = self.patch_positions()
        if insert is not None and at == 0:
            patches = insert(self.patch_embed(images))
            patches = patches if positions is None else patches + positions
        else:
            patches = self.patch_embed(images, ids_keep, positions)
        x = self._with_prefix(patches)
        context = self._block_context(ids_keep)
        for index, block in enumerate(self.blocks):
            if insert is not None and index == at > 0:
                prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
                x = torch.cat((prefix, insert(patches)), dim=1)
            x = block(x, *context)
        return self.norm(x)

    def _map(self, tokens: Tensor) -> Tensor:
        """Tokens [B, P + N, D] -> their patches as a map [B, D, gh, gw]."""
        return tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, self.grid_size)

    def _block_context(self, ids_keep: Tensor | None) -> tuple[Tensor | None, ...]:
        """What every block receives beside the tokens."""
        return ()

    def patch_positions(self) -> Tensor | None:
        """[N, D], added to the patches."""
        if self.pos_embed is None:
            return None
        return self.pos_embed[0, 0 if self.no_embed_class else self.num_prefix_tokens :]

    def _with_prefix(self, patches: Tensor) -> Tensor:
        """[B, N or K, D] -> [B, P + N or K, D]: prefix tokens, with their positions, in front."""
        tokens: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if not tokens:
            return patches
        prefix = torch.cat(tokens, dim=1)
        if self.pos_embed is not None and not self.no_embed_class:
            prefix = prefix + self.pos_embed[:, : self.num_prefix_tokens]
        return torch.cat((prefix.expand(patches.shape[0], -1, -1), patches), dim=1)

    def _check_images(self, images: Tensor) -> None:
        super()._check_images(images)
        if tuple(images.shape[2:]) != self.img_size:
            raise ValueError(
                f"{self._label}: built for images of {self.img_size[0]} x {self.img_size[1]} pixels (img_size), "
                f"but was given {images.shape[2]} x {images.shape[3]}"
            )


def _attend_once(
    block: FusedBlock | FusedBeitBlock,
    x: Tensor,
    visible: Tensor,
    token: Tensor,
    ids_restore: Tensor,
    context: tuple[Tensor | None, ...],
    *,
    num_prefix_tokens: int,
    collapse_keys: bool | None,
) -> Tensor:
    """A block's output for the sequence x, whose removed rows are `token`. collapse_keys None: where nothing tells the
    keys apart."""
    bias = block.attn.bias(*context) if isinstance(block, FusedBeitBlock) else None
    attended = mask_token_attention(
        block.norm1,
        block.attn,
        visible,
        token,
        ids_restore,
        num_prefix_tokens=num_prefix_tokens,
        bias=bias,
        collapse_keys=bias is None if collapse_keys is None else collapse_keys,
    )
    return block.finish(x, attended)
