"""What every encoder offers, whatever its family: features, a spatial map, and a point where a mask token may enter.

Legend: B batch, C channels, H W image, h w last feature map, N = h * w patches, D token width.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

InsertFunction = Callable[[Tensor], Tensor]


class Insertion(NamedTuple):
    """The features that `insert` receives in `forward_map(images, insert, at)`."""

    channels: int
    stride: int  # pixels per cell
    layout: Literal["tokens", "map"]  # [B, N, channels] row-major, or [B, channels, h, w]


class Encoder(nn.Module):
    """Base of all encoders. `create_encoder` fills in `name` and `timm_kwargs`."""

    name: str  # the timm model name
    timm_kwargs: dict[str, Any]  # timm.create_model(name, **timm_kwargs) builds the same module
    num_features: int  # channels of the last feature map
    stride: int  # pixels per cell of the last feature map
    in_chans: int
    num_classes: int

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.timm_kwargs = {}

    @staticmethod
    def to_timm(kwargs: dict[str, Any]) -> dict[str, Any]:
        """Translate the keyword arguments given to `create_encoder` into those of `timm.create_model`.

        A family overrides this when it accepts something that timm does not (such as a CNN's `img_size`).
        """
        return kwargs

    def forward_features(self, images: Tensor) -> Tensor:
        """As timm: tokens [B, prefix + N, D] after the final norm, or a map [B, C, h, w]."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As timm: pooled features [B, C], then the classifier unless `pre_logits` or `num_classes == 0`."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_map(self, images: Tensor, insert: InsertFunction | None = None, at: int | None = None) -> Tensor:
        """The last spatial feature map [B, C_last, h, w].

        Args:
            images: [B, in_chans, H, W].
            insert: applied to the features at the insertion point, whose shape `insertion(at)` describes; it
                returns a tensor of the same shape.
            at: the insertion point; the family's default when None.
        """
        raise NotImplementedError

    def insertion(self, at: int | None = None) -> Insertion:
        """Width, stride and layout of the features at insertion point `at`.

        Raises:
            ValueError: the encoder has no such point.
        """
        raise NotImplementedError

    def module_before(self, at: int | None = None) -> str:
        """CNNs: the name of the submodule whose output `insert` receives at insertion point `at`."""
        raise NotImplementedError

    def forward_from(self, x: Tensor, at: int | None = None) -> Tensor:
        """CNNs: the rest of `forward_map`: features at insertion point `at` -> the last map."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed although they are neither biases nor one-dimensional."""
        return set()

    @property
    def _label(self) -> str:
        """How error messages call this encoder."""
        return self.name or type(self).__name__

    def _insertion_index(self, at: int | None, count: int, default: int) -> int:
        """`at` with its default, checked against the number of insertion points."""
        index = default if at is None else at
        if not 0 <= index < count:
            raise ValueError(
                f"{self._label}: insertion point at={at} does not exist; "
                f"this encoder has points 0 to {count - 1} (default {default})"
            )
        return index

    def _check_images(self, images: Tensor) -> None:
        """Images are [B, in_chans, H, W]."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"{self._label}: expects images [B, {self.in_chans}, H, W], but was given {list(images.shape)}"
            )


def pair(value: int | tuple[int, int] | list[int], what: str) -> tuple[int, int]:
    """(height, width) from one number or two.

    Raises:
        ValueError: not one or two positive integers.
    """
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(v, int) and v > 0 for v in both):
        raise ValueError(f"{what} is a positive integer or (height, width), but was given {value!r}")
    return both[0], both[1]
