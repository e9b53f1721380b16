"""DALI at work: batches of inputs in, tensors out, and which images are to blame when it fails."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmim.data.dali_graph import Fed, Graph
from fastmim.data.dali_trial import gist, trial
from fastmim.data.errors import WorkerError


class DaliPipe:
    """A pipeline, built when it is needed and anew after a failure: what was under way then has to be started again.

    To be used from one thread.

    Args:
        graph: the operations.
        batch_size: the most images of a batch.
        threads: that decode on the CPU.
        device: where the tensors are to be: the GPU on which a graph for "gpu" runs, else the CPU.
    """

    def __init__(self, graph: Graph, batch_size: int, threads: int, device: torch.device) -> None:
        self.graph, self.device = graph, device
        self.dtype = torch.uint8 if graph.mean is None else torch.float32
        self.shapes = [(graph.channels, *view.size) for view in graph.views]
        self._batch_size, self._threads = batch_size, threads
        gpu = graph.device == "gpu"
        self._device_id = torch.cuda.current_device() if gpu and device.index is None else device.index if gpu else None
        self._stream = torch.cuda.Stream(device) if gpu else None
        self._pipe: Any = None

    def start(self, fed: Sequence[Fed]) -> None:
        """Feed a batch; it is made in DALI's own threads.

        Raises:
            WorkerError: DALI does not start.
        """
        try:
            if self._pipe is None:
                self._pipe = self.graph.build(self._batch_size, self._threads, self._device_id)
            self.graph.feed(self._pipe, fed)
        except RuntimeError as error:
            raise _failure(gist(error)) from error

    def finish(self, count: int) -> list[Tensor]:
        """The views of the batch of `count` images that was started first.

        Raises:
            RuntimeError: DALI failed on it.
        """
        from nvidia.dali.plugin.pytorch import feed_ndarray

        try:
            if self._stream is None:
                views = self.empty(count)
                for output, view in zip(self._pipe.outputs(), views, strict=True):
                    feed_ndarray(output.as_tensor(), view)
                return views
            with torch.cuda.stream(self._stream):
                views = self.empty(count)
                for output, view in zip(self._pipe.outputs(cuda_stream=self._stream), views, strict=True):
                    feed_ndarray(output.as_tensor(), view, cuda_stream=self._stream)
            self._stream.synchronize()  # this thread waits, training does not
            return views
        except RuntimeError:
            self._pipe = None
            raise

    def empty(self, count: int) -> list[Tensor]:
        return [torch.empty((count, *shape), dtype=self.dtype, device=self.device) for shape in self.shapes]

    def sorted_out(self, fed: Sequence[Fed], error: RuntimeError) -> tuple[dict[int, str], list[Tensor]]:
        """Which of the images DALI cannot decode, after it failed on them with `error`: their places, each with a
        reason; and the views of the others.

        Raises:
            WorkerError: it is DALI that fails, not the images.
        """
        self._pipe = None
        refused: dict[int, str] = {}
        left, blameless = list(range(len(fed))), False
        while left:
            found = self._named(left, error) or self._by_halving(fed, left)
            if len(found) == len(left) or (blameless and not found):
                reason = trial(self.graph.device, self._device_id) or ("" if found else gist(error))
                if reason:
                    raise _failure(reason) from error
            blameless = not found
            refused |= dict.fromkeys(found, gist(error))
            left = [place for place in left if place not in found]
            try:
                return refused, self._run([fed[place] for place in left])
            except RuntimeError as another:
                error = another
        return refused, self.empty(0)

    def _named(self, places: Sequence[int], error: RuntimeError) -> list[int]:
        """The place that DALI's message names."""
        named = re.search(r"sample #(\d+)", str(error))
        return [places[int(named[1])]] if named and int(named[1]) < len(places) else []

    def _by_halving(self, fed: Sequence[Fed], places: list[int]) -> list[int]:
        try:
            self._run([fed[place] for place in places])
            return []
        except RuntimeError:
            if len(places) == 1:
                return places
        middle = len(places) // 2
        return [*self._by_halving(fed, places[:middle]), *self._by_halving(fed, places[middle:])]

    def _run(self, fed: Sequence[Fed]) -> list[Tensor]:
        if not fed:
            return self.empty(0)
        self.start(fed)
        return self.finish(len(fed))


def _failure(reason: str) -> WorkerError:
    return WorkerError(f"DALI fails: {reason}. --data.pipeline pillow does without it.")
