"""Patch mixing: as an embedding for masked image modeling, and of whole images with their labels.

Legend: B images in groups of G, S = B / G groups, (p, q) patch, L = gh * gw positions, D width, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.ops import MixingMap, mixing_map, patch_mix
from fastmim.ops.backends import check_divisible
from fastmim.ops.mixing_map import groups_of
from fastmim.ops.patch_mix import image_of_position

__all__ = ["ImagePatchMix", "PatchMix", "mix_images"]


def mix_images(images: Tensor, segments: Tensor, patch: tuple[int, int], full: bool = False) -> Tensor:
    """Images whose patches come from the images of their group: [S, C, H, W], or [B, C, H, W] in full mixing.

    Args:
        images: [B, C, H, W], any dtype; differentiable where they are floating point.
        segments: [S, L] int64, as `mixing_map` gives it.
        patch: (p, q).
        full: image j of a group shows at each position image (M + j) mod G.
    """
    channels, height, width = images.shape[1:]
    check_divisible("mix_images", height, width, patch)
    gh, gw = height // patch[0], width // patch[1]
    if segments.shape[1] != gh * gw:
        raise ValueError(f"mix_images: segments {list(segments.shape)} do not fit images of {gh}x{gw} patches")
    source = image_of_position(segments, images.shape[0] // max(segments.shape[0], 1), full)
    cells = images.unflatten(3, (gw, patch[1])).unflatten(2, (gh, patch[0])).permute(0, 2, 4, 1, 3, 5)
    place = torch.arange(gh * gw, device=images.device)
    mixed = cells[source, place // gw, place % gw].unflatten(1, (gh, gw))  # [S or B, gh, gw, C, p, q]
    return mixed.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


class PatchMix(nn.Module):
    """Patch embedding of mixed images, with the keys of timm's PatchEmbed (`proj.weight`, `proj.bias`).

    Args:
        img_size, patch_size: (height, width) or one number, in pixels.
        in_chans, embed_dim: channels of the images, width of the tokens.
        group_size: G.
        full: G mixed sequences a group instead of one.
        mean, std: one number a channel; pixels are normalised on the way. None takes them as they are (uint8 / 255).
        bias: of the projection.

    Source: MixedAE (arXiv 2303.17152).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        group_size: int = 4,
        full: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        size, patch = ((v, v) if isinstance(v, int) else v for v in (img_size, patch_size))
        check_divisible("PatchMix", *size, patch)
        self.grid_size = (size[0] // patch[0], size[1] // patch[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.group_size, self.full, self.mean, self.std = group_size, full, mean, std
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch, stride=patch, bias=bias)

    def forward(
        self, images: Tensor, rng: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, MixingMap]:
        """Mix and embed.

        Args:
            images: [B, C, H, W], uint8 or floating point; B divisible by G.
            rng: [3] int64 (seed, step, index of the first image), which decides the map; None draws a seed.
            positions: [L, D], added to every sequence.

        Returns:
            (tokens [S, L, D], or [B, L, D] with `full`; the maps of the groups).
        """
        groups = groups_of(images.shape[0], self.group_size, "PatchMix")
        mixing = mixing_map(groups, self.group_size, self.num_patches, _rng(images) if rng is None else rng)
        tokens = patch_mix(
            images, mixing.segments, self.proj.weight, self.proj.bias, positions,
            mean=self.mean, std=self.std, full=self.full,
        )  # fmt: skip
        return tokens, mixing


class ImagePatchMix(nn.Module):
    """Patch mixing of images and labels for supervised training, used as CutMix is: after the loader, before the model.

    Every image is mixed with the others of its group of G neighbours in the batch, patch by patch, and its label with
    theirs by the area that each shows. No pixel is lost: together, the mixed images of a group show each patch once.
    In evaluation mode images and labels pass through unmixed.

    Args:
        group_size: G; 2 mixes pairs.
        patch_size: side of a patch, or (p, q), in pixels.
        num_classes: K; with it labels become soft labels, without it a pair (labels, weights).
        label_smoothing: share of a soft label that is spread over all classes.
    """

    def __init__(
        self,
        group_size: int = 2,
        patch_size: int | tuple[int, int] = 16,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if label_smoothing and num_classes is None:
            raise ValueError("ImagePatchMix: label_smoothing is of soft labels, which need num_classes")
        self.group_size, self.num_classes, self.label_smoothing = group_size, num_classes, label_smoothing
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size

    def forward(
        self, images: Tensor, labels: Tensor, rng: Tensor | None = None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """Mix a batch.

        Args:
            images: [B, C, H, W], any dtype; B divisible by G.
            labels: [B] int64.
            rng: [3] int64 (seed, step, index of the first image), which decides the map; None draws a seed.

        Returns:
            (images [B, C, H, W], soft labels [B, K]), or without num_classes (images, (labels [B, G], weights [B, G])):
            the loss is then the sum over G of weight times loss for that label.
        """
        size = self.group_size if self.training else 1
        batch, height, width = images.shape[0], *images.shape[2:]
        check_divisible("ImagePatchMix", height, width, self.patch_size)
        if not self.training:
            owners, weights = labels[:, None], torch.ones(batch, 1, device=images.device)
        else:
            groups = groups_of(batch, size, "ImagePatchMix")
            length = (height // self.patch_size[0]) * (width // self.patch_size[1])
            segments = mixing_map(groups, size, length, _rng(images) if rng is None else rng).segments
            images = mix_images(images, segments, self.patch_size, full=True)
            source = image_of_position(segments, size, full=True) % size  # [B, L]
            weights = F.one_hot(source, size).sum(dim=1) / length
            owners = labels.unflatten(0, (groups, size)).repeat_interleave(size, 0)
        if self.num_classes is None:
            return images, (owners, weights)
        soft = (F.one_hot(owners, self.num_classes) * weights.unsqueeze(-1)).sum(dim=1)
        return images, soft * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes


def _rng(images: Tensor) -> Tensor:
    """A fresh seed from torch's generator, on the device of the images."""
    return torch.cat((torch.randint(2**63 - 1, (1,)), torch.zeros(2, dtype=torch.int64))).to(images.device)
