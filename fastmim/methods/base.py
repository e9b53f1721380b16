"""What every method shares: the batch that it gets, the output that it gives, the interface that the trainer sees."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmim.models.encoder import Encoder
from fastmim.models.token_encoder import TokenEncoder


@dataclass
class Batch:
    """One step's images on one device. Every random draw of the step is a function of `rng`."""

    images: Tensor
    """[B, C, H, W] floating point, normalised."""
    rng: Tensor
    """int64 [3] on the device of `images`: seed, step, index of the first image of this batch in the global batch."""
    labels: Tensor | None = None
    """[B] int64 class labels; no method here learns from them."""
    indices: Tensor | None = None
    """[B] int64 positions of the images in their source."""
    views: dict[str, Tensor] = field(default_factory=dict)
    """Further views of the same images, by name, [B, C, h, w] each; `images` is the first view."""
    schedules: dict[str, Tensor] = field(default_factory=dict)
    """What `Method.schedules` gives at this step: 0-dim fp32 tensors on the device."""

    @property
    def size(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            self.rng.to(device, non_blocking=non_blocking),
            move(self.labels),
            move(self.indices),
            {name: view.to(device, non_blocking=non_blocking) for name, view in self.views.items()},
            {name: value.to(device, non_blocking=non_blocking) for name, value in self.schedules.items()},
        )


@dataclass
class Pictures:
    """What a person looks at. All [B, C, H, W] in the normalised pixel space of the batch."""

    original: Tensor
    masked: Tensor
    """What the encoder was given (methods that drop cells show them as 0, the mean colour of the data set)."""
    reconstruction: Tensor
    """The prediction at removed cells, the original elsewhere; normalised targets are un-normalised."""


@dataclass
class Output:
    """What a step gives."""

    loss: Tensor
    """Scalar fp32, to be differentiated."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Named scalars for the log, detached."""
    pictures: Callable[[], Pictures] | None = None
    """Computes the pictures of this step when called; costs nothing until then."""


class Method(nn.Module):
    """A pre-training method: mask, encode, decode, loss. `encoder` is what gets exported.

    A subclass declares `name` and `Config` (a dataclass; its field docstrings are the `--help`), builds itself from
    (encoder, cfg, img_size) and raises `ValueError` with one sentence where these cannot work together.
    `forward` neither synchronises with the host nor has data-dependent shapes, so a step can be captured.
    """

    name: ClassVar[str]
    Config: ClassVar[type]

    encoder: Encoder
    img_size: tuple[int, int]

    def __init__(self, encoder: Encoder, cfg: Any, img_size: tuple[int, int]) -> None:
        super().__init__()
        if isinstance(encoder, TokenEncoder) and encoder.img_size != img_size:
            raise ValueError(
                f"{self.name}: the images have {size_text(img_size)} pixels, but the encoder's positions are those of "
                f"{size_text(encoder.img_size)}; build the encoder with the same img_size."
            )
        self.encoder = encoder
        self.cfg = cfg
        self.img_size = img_size

    def forward(self, batch: Batch) -> Output:
        raise NotImplementedError

    def after_step(self, step: Tensor) -> None:
        """Called after each optimiser step, for averaged teachers and centres. Nothing by default.

        `step` is the step's index, an int64 scalar on the device: the call is part of a captured step. Where weights
        are spread over processes, parameters are DTensors here: operations between tensors of one shape work on them.
        """

    def view_specs(self, img_size: tuple[int, int]) -> tuple[Any, ...]:
        """`fastmim.data.ViewSpec` of each view that a batch is to carry, the first being `images`; empty: only that."""
        return ()

    def schedules(self, total_steps: int, steps_per_epoch: int) -> dict[str, Callable[[int], float]]:
        """Name -> value at each step (counted from 0), found in `Batch.schedules`: momentum, temperatures."""
        return {}

    def runs_in_layers(self) -> tuple[nn.Module, ...]:
        """Modules whose layers this method runs one by one instead of calling their blocks: FSDP gathers them whole."""
        return ()

    def lr_scales(self) -> dict[str, float]:
        """Parameter name -> multiple of the learning rate; names that are absent have 1."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Names that are not decayed, besides the 1-D parameters and biases that the optimiser never decays."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def check_images(self, images: Tensor) -> None:
        """Shapes are fixed when the method is built; say so before a kernel does."""
        if tuple(images.shape[-2:]) != self.img_size:
            raise ValueError(
                f"{self.name}: built for images of {size_text(self.img_size)} pixels, "
                f"got {size_text(tuple(images.shape[-2:]))} (images: {list(images.shape)})."
            )


def size_text(size: tuple[int, ...]) -> str:
    """(224, 192) -> "224x192" (height first)."""
    return "x".join(str(side) for side in size)
