"""Batches made by DALI, on the CPU or the GPU: decoding, cropping, resizing, flipping and normalising.

Crop boxes and flips are ours (fastmim.data.draws), handed in with the encoded bytes; so the batches are those of the
Pillow pipeline but for resampling (docs/dali.md has the distance).

A thread reads files and keeps DALI busy: while training uses one batch, the next ones are made. What is not an upright
JPEG in grey or YCbCr, or is damaged, DALI would convert by other rules: it is made by Pillow, row by row. A batch that
DALI fails on is made again by a new pipeline, without the images that it cannot decode, and so are those after it;
such images are Pillow's from then on, which reads or replaces them. A row is a function of (epoch, index), so all that
has to be remembered for this is which rows were asked for.
"""

import atexit
import io
import logging
import queue
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import JpegImagePlugin
from torch import Tensor

from fastmim.data.dali_graph import Fed, Graph
from fastmim.data.dali_pipe import DaliPipe
from fastmim.data.decode import orientation, upright_size
from fastmim.data.errors import WorkerError, printable
from fastmim.data.pipeline import Made, TrainRow
from fastmim.data.pixels import normalise
from fastmim.data.workers import Task

_log = logging.getLogger("fastmim.data")
_IN_DALI = 2  # batches fed at a time: one is made, the next waits for it
_PATIENCE_SECONDS = 60.0  # a batch awaited for so long is mentioned


@dataclass
class _UnderWay:
    """A batch, from its being asked for to its being taken."""

    tasks: Sequence[Task]
    made: list[Made]
    rows: list[int] = field(default_factory=list)  # made by DALI
    fed: list[Fed] = field(default_factory=list)  # its inputs for these
    pillow: dict[int, NDArray[np.uint8]] = field(default_factory=dict)  # other rows: their views, one after the other
    views: list[Tensor] = field(default_factory=list)  # of `rows`


class DaliBatches:
    """Batches made ahead in the order in which they are asked for.

    Args:
        make: draws the crops, and makes the rows that DALI cannot.
        graph: what DALI does.
        batch_size: the most rows of a batch.
        threads: that decode on the CPU, and as many that read files.
        ahead: how many batches may be asked for before one is taken.
        device: where the batches are to be: the GPU for a graph on "gpu", else the CPU.
    """

    def __init__(
        self, make: TrainRow, graph: Graph, batch_size: int, threads: int, ahead: int, device: torch.device
    ) -> None:
        self.ahead = ahead
        self._make, self._threads = make, max(1, threads)
        self._pipe = DaliPipe(graph, batch_size, self._threads, device)
        self._refused: set[int] = set()  # images that DALI does not decode, whatever the crop
        self._asked: queue.SimpleQueue[Sequence[Task] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[_UnderWay | WorkerError] = queue.SimpleQueue()
        self._closing = False
        self._readers = ThreadPoolExecutor(self._threads, "fastmim data reader")
        self._thread = threading.Thread(target=self._work, name="fastmim DALI", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # DALI's threads would not survive Python's end

    def ask(self, tasks: Sequence[Task]) -> None:
        self._asked.put(tasks)

    def take(self) -> tuple[list[Tensor], list[Made]]:
        """The oldest batch asked for: its views, [B, C, H, W] each, and what became of the rows.

        Raises:
            WorkerError: DALI does not work, or something failed that is not the fault of an image.
        """
        while True:
            try:
                batch = self._done.get(timeout=_PATIENCE_SECONDS)
                break
            except queue.Empty:
                _log.warning("still waiting for the next batch of DALI")
        if isinstance(batch, WorkerError):
            self._done.put(batch)  # for whoever asks again
            raise batch
        for view in batch.views:
            if view.is_cuda:  # made on another stream
                view.record_stream(torch.cuda.current_stream(view.device))
        return self._joined(batch) if batch.pillow else batch.views, batch.made

    def close(self) -> None:
        """End the threads. Batches not taken are dropped."""
        self._closing = True
        self._asked.put(None)
        self._thread.join()
        self._readers.shutdown(cancel_futures=True)
        atexit.unregister(self.close)

    def _joined(self, batch: _UnderWay) -> list[Tensor]:
        """Each view with DALI's and Pillow's rows in their places."""
        pipe, graph = self._pipe, self._pipe.graph
        pillow = torch.from_numpy(np.stack(list(batch.pillow.values())))
        parts = pillow.split([int(np.prod(shape)) for shape in pipe.shapes], dim=1)
        joined = pipe.empty(len(batch.tasks))
        for whole, view, part in zip(joined, batch.views, parts, strict=True):
            own = part.reshape(-1, *whole.shape[1:]).to(pipe.device)
            if graph.mean is not None and graph.std is not None:
                own = normalise(own, graph.mean, graph.std)
            whole[batch.rows] = view
            whole[list(batch.pillow)] = own
        return joined

    # What follows runs in the thread.

    def _work(self) -> None:
        try:
            if self._pipe.device.type == "cuda":
                torch.cuda.set_device(self._pipe.device)
            self._make_batches()
        except WorkerError as error:
            self._done.put(error)
        except Exception as error:
            failure = WorkerError(f"The batches of DALI failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._done.put(failure)

    def _make_batches(self) -> None:
        under_way: deque[_UnderWay] = deque()
        while not self._closing:
            if len(under_way) < _IN_DALI:
                try:
                    tasks = self._asked.get(block=not under_way)
                except queue.Empty:
                    pass
                else:
                    if tasks is not None:
                        batch = self._read(tasks)
                        under_way.append(batch)
                        self._start(batch)
                    continue
            batch = under_way.popleft()
            self._finish(batch, under_way)
            self._done.put(batch)

    def _read(self, tasks: Sequence[Task]) -> _UnderWay:
        """Files and crops of a batch, by all readers together."""
        batch = _UnderWay(tasks, [Made(index, ()) for _, index in tasks])
        edges = [len(tasks) * number // self._threads for number in range(self._threads + 1)]
        chunks = [tasks[first:last] for first, last in pairwise(edges)]
        read = [each for chunk in self._readers.map(self._read_some, chunks) for each in chunk]
        for row, one in enumerate(read):
            if isinstance(one, tuple):
                batch.made[row], batch.pillow[row] = one
            else:
                batch.rows.append(row)
                batch.fed.append(one)
        return batch

    def _read_some(self, tasks: Sequence[Task]) -> list[Fed | tuple[Made, NDArray[np.uint8]]]:
        return [self._inputs(*task) or self._by_pillow(task) for task in tasks]

    def _inputs(self, epoch: int, index: int) -> Fed | None:
        """What DALI is fed for an image; None for what Pillow is to make."""
        if index in self._refused:
            return None
        try:
            image = self._make.source.open(index)
            if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.mode not in ("RGB", "L"):
                return None
            if orientation(image) != 1 or not isinstance(image.fp, io.BytesIO):
                return None
            encoded = image.fp.getvalue()
            if not encoded.rstrip(b"\0").endswith(b"\xff\xd9"):  # truncated: DALI would fill it up with grey
                return None
            return self._pipe.graph.fed(encoded, self._make.draw(upright_size(image), epoch, index))
        except Exception:  # unreadable: the Pillow row counts and replaces it
            return None

    def _by_pillow(self, task: Task) -> tuple[Made, NDArray[np.uint8]]:
        shapes = self._pipe.shapes
        row = np.zeros(sum(int(np.prod(shape)) for shape in shapes), dtype=np.uint8)
        return self._make(row.reshape(shapes[0]) if len(shapes) == 1 else row, *task), row

    def _start(self, batch: _UnderWay) -> None:
        if batch.fed:
            self._pipe.start(batch.fed)

    def _finish(self, batch: _UnderWay, later: Sequence[_UnderWay]) -> None:
        if not batch.fed:
            batch.views = self._pipe.empty(0)
            return
        try:
            batch.views = self._pipe.finish(len(batch.fed))
        except RuntimeError as error:
            refused, batch.views = self._pipe.sorted_out(batch.fed, error)
            indices = {place: batch.tasks[batch.rows[place]][1] for place in refused}
            self._refused.update(indices.values())
            self._give_to_pillow(batch, refused)
            for place, index in indices.items():
                if index in {made.image for made in batch.made}:  # else the budget tells
                    name = printable(self._make.source.path(index))
                    _log.warning("DALI cannot decode %s (%s): Pillow reads it from here on", name, refused[place])
            for other in later:  # it went down with the pipeline
                indices = {place: other.tasks[row][1] for place, row in enumerate(other.rows)}
                self._give_to_pillow(other, [place for place, index in indices.items() if index in self._refused])
                self._start(other)

    def _give_to_pillow(self, batch: _UnderWay, places: Iterable[int]) -> None:
        for place in sorted(places, reverse=True):
            row = batch.rows.pop(place)
            del batch.fed[place]
            batch.made[row], batch.pillow[row] = self._by_pillow(batch.tasks[row])
