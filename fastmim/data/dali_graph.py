"""The operations that DALI runs: encoded JPEGs, boxes and flips go in, views come out. One definition for CPU and GPU.

Crops are drawn by us and handed in, so nothing here is random and nothing has a state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastmim.data.draws import Box
from fastmim.data.views import ViewSpec

Fed = list[NDArray[Any]]  # what `Graph.inputs` names, of one image


@dataclass(frozen=True)
class Graph:
    """What is made of every image.

    views: the crops; those that name another view's `crop` are cut from the same box.
    channels: 3 (colour) or 1 (grey).
    interpolation: "bicubic" or "bilinear", always with antialiasing.
    mean, std: numbers in [0, 1] for each channel: the views are normalised float32; None: they are uint8.
    device: where everything but the parsing of the files happens; "gpu" decodes there, too.
    """

    views: Sequence[ViewSpec]
    channels: int
    interpolation: str
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    device: Literal["cpu", "gpu"] = "cpu"

    @property
    def one_box(self) -> bool:
        """All views show the same part of the image, so that nothing else needs to be decoded."""
        return all(view.crop is not None for view in self.views[1:])

    @property
    def boxes(self) -> int:
        """How many boxes and flips each image comes with."""
        return 1 if self.one_box else len(self.views)

    @property
    def inputs(self) -> list[str]:
        """Names of what is fed: the file, then top left, height and width, and flip of each box."""
        return ["file", *(f"{what}{box}" for box in range(self.boxes) for what in ("start", "shape", "flip"))]

    def define(self, pipe: Any) -> None:
        """Add the operations to an empty pipeline."""
        from nvidia.dali import fn
        from nvidia.dali import types as dali_types

        types: Any = dali_types  # its constants come from C++, unseen by type checkers
        kind = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[self.interpolation]
        reading: dict[str, Any] = {
            "device": "mixed" if self.device == "gpu" else "cpu",
            "output_type": types.RGB if self.channels == 3 else types.GRAY,
            "jpeg_fancy_upsampling": True,  # on the GPU as libjpeg does it
            "use_fast_idct": False,
            "adjust_orientation": False,  # only upright images are fed, and damaged EXIF counts as upright
            "hw_decoder_load": 1.0,  # a share would make pixels depend on what else is in the batch
        }
        writing: dict[str, Any] = {"output_layout": "CHW", "dtype": types.UINT8}
        if self.mean is not None and self.std is not None:
            levels = {"mean": [255 * m for m in self.mean], "std": [255 * s for s in self.std]}
            writing |= {"dtype": types.FLOAT, **levels}
        with pipe:
            fed: dict[str, Any] = {name: fn.external_source(name=name, device="cpu") for name in self.inputs}
            if self.one_box:
                box = {"start": fed["start0"], "shape": fed["shape0"], "axes": (0, 1)}
                crops = [fn.decoders.image_slice(fed["file"], **box, **reading)] * len(self.views)
            else:
                image = fn.decoders.image(fed["file"], **reading)
                crops = [
                    fn.slice(image, start=fed[f"start{number}"], shape=fed[f"shape{number}"], axes=(0, 1))
                    for number in range(len(self.views))
                ]
            outputs = []
            for number, (crop, view) in enumerate(zip(crops, self.views, strict=True)):
                resized: Any = fn.resize(crop, size=list(view.size), interp_type=kind, antialias=True)
                flip = fed["flip0" if self.one_box else f"flip{number}"]
                outputs.append(fn.crop_mirror_normalize(resized, mirror=flip, **writing))
            pipe.set_outputs(*outputs)

    def build(self, batch_size: int, threads: int, device_id: int | None) -> Any:
        """A pipeline for batches of up to `batch_size` images, ready to run.

        Raises:
            RuntimeError: there is no GPU where one is needed.
        """
        from nvidia.dali import Pipeline

        pipe = Pipeline(batch_size, threads, device_id, prefetch_queue_depth=1)
        self.define(pipe)
        pipe.build()
        return pipe

    def fed(self, encoded: bytes, drawn: Sequence[tuple[Box, bool]]) -> Fed:
        """The inputs of one image: its file, box and flip of every view."""
        inputs: Fed = [np.frombuffer(encoded, dtype=np.uint8)]
        for box, flip in drawn[: self.boxes]:
            inputs.append(np.array([box.top, box.left], dtype=np.int32))
            inputs.append(np.array([box.height, box.width], dtype=np.int32))
            inputs.append(np.array(flip, dtype=np.int32))
        return inputs

    def feed(self, pipe: Any, fed: Sequence[Fed]) -> None:
        """Start a batch; `pipe.outputs()` waits for the oldest one."""
        for name, column in zip(self.inputs, zip(*fed, strict=True), strict=True):
            pipe.feed_input(name, list(column))
        pipe.schedule_run()
