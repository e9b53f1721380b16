"""Rows made by DALI on the CPU: decoding, cropping, resizing and flipping in its own threads.

Crop boxes and flips are ours (fastmim.data.draws), handed in with the encoded bytes; so the batches are those of the
Pillow pipeline but for resampling: on six photographs cropped to 224 x 224, 0.16 of 255 levels on average over an
image, 0.20 in the worst, 14 at the worst pixel.

Whatever is not an upright JPEG in grey or YCbCr, or is damaged, DALI would convert by other rules: it
is made by Pillow, row by row; so is a whole batch that DALI refuses, after which its pipeline is built anew.
"""

import io
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import JpegImagePlugin

from fastmim.data.decode import orientation, upright_size
from fastmim.data.errors import DataError
from fastmim.data.pipeline import Made, TrainRow
from fastmim.data.workers import Task

_log = logging.getLogger("fastmim.data")
INSTALL = 'pip install "fastmim[dali]"'


def why_not() -> str:
    """Empty where DALI can be imported, else the reason."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return f"DALI is not installed ({error}): {INSTALL}"
    return ""


class DaliRows:
    """Batches of `shape` made by `threads` threads of DALI; see `fastmim.data.workers.Batches`.

    Raises:
        DataError: DALI is not installed.
    """

    ahead = 1

    def __init__(self, make: TrainRow, shape: tuple[int, ...], threads: int, interpolation: str) -> None:
        reason = why_not()
        if reason:
            raise DataError(f"data.pipeline is dali, but {reason}.")
        self._make, self._threads, self._interpolation = make, max(1, threads), interpolation
        self._rows = np.zeros(shape, dtype=np.uint8)
        self._asked: deque[Sequence[Task]] = deque()
        self._pipe: Any = None

    def ask(self, tasks: Sequence[Task]) -> None:
        self._asked.append(tasks)

    def take(self) -> tuple[NDArray[np.uint8], list[Made]]:
        tasks = self._asked.popleft()
        made: list[Made] = [Made(-1, ())] * len(tasks)
        ours, fed = [], []
        for row, (epoch, index) in enumerate(tasks):
            inputs = self._inputs(epoch, index)
            if inputs is None:
                made[row] = self._make(self._rows[row], epoch, index)
            else:
                ours.append(row)
                fed.append(inputs)
        if ours:
            try:
                views = self._run(fed)
            except RuntimeError as error:
                _log.warning("DALI refused a batch, which Pillow makes instead: %s", str(error).strip()[:200])
                self._pipe = None
                for row in ours:
                    made[row] = self._make(self._rows[row], *tasks[row])
            else:
                for number, row in enumerate(ours):
                    parts = [view[number].transpose(2, 0, 1).ravel() for view in views]
                    self._rows[row].reshape(-1)[:] = np.concatenate(parts)
                    made[row] = Made(tasks[row][1], ())
        return self._rows[: len(tasks)], made

    def close(self) -> None:
        self._asked.clear()
        self._pipe = None

    def _inputs(self, epoch: int, index: int) -> list[NDArray[Any]] | None:
        """Bytes, then anchor, shape and flip of each view; None for what Pillow is to make."""
        source = self._make.source
        try:
            image = source.open(index)
            if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.mode not in ("RGB", "L"):
                return None
            if orientation(image) != 1 or not isinstance(image.fp, io.BytesIO):
                return None
            encoded = image.fp.getvalue()
            if not encoded.rstrip(b"\0").endswith(b"\xff\xd9"):  # truncated: DALI would fill it up with grey
                return None
            inputs = [np.frombuffer(encoded, dtype=np.uint8)]
            for box, flip in self._make.draw(upright_size(image), epoch, index):
                inputs.append(np.array([box.top, box.left], dtype=np.int64))
                inputs.append(np.array([box.height, box.width], dtype=np.int64))
                inputs.append(np.array(flip, dtype=np.int32))
            return inputs
        except Exception:  # unreadable: the Pillow row counts and replaces it
            return None

    def _run(self, fed: list[list[NDArray[Any]]]) -> list[NDArray[np.uint8]]:
        """[n, H, W, C] uint8 of each view."""
        if self._pipe is None:
            self._pipe = self._built()
        for number, column in enumerate(zip(*fed, strict=True)):
            self._pipe.feed_input(f"in{number}", list(column))
        return [output.as_array() for output in self._pipe.run()]

    def _built(self) -> Any:
        from nvidia.dali import Pipeline, fn
        from nvidia.dali import types as dali_types

        types: Any = dali_types  # its constants come from C++, unseen by type checkers

        kind = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[self._interpolation]
        colour = types.RGB if self._make.source.in_chans == 3 else types.GRAY
        views = self._make.views
        pipe = Pipeline(
            len(self._rows), self._threads, None, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False
        )
        with pipe:
            inputs = [fn.external_source(name=f"in{number}") for number in range(1 + 3 * len(views))]
            image = fn.decoders.image(inputs[0], output_type=colour, use_fast_idct=False)
            outputs = []
            for number, view in enumerate(views):
                anchor, size, flip = inputs[1 + 3 * number : 4 + 3 * number]
                crop: Any = fn.slice(image, anchor, size, axes=(0, 1), normalized_anchor=False, normalized_shape=False)
                crop = fn.resize(crop, size=list(view.size), interp_type=kind, antialias=True)
                outputs.append(fn.flip(crop, horizontal=flip))
            pipe.set_outputs(*outputs)
        pipe.build()
        return pipe
