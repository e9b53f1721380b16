"""Work beside training: copies of tensors in host memory, and one job at a time in a thread of its own."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastmim.engine.pieces import Pieces

__all__ = ["Background", "HostCopies"]


class HostCopies:
    """Copies that stay as they are while the originals go on changing. Their memory is kept from one time to the next;
    for a GPU it is pinned, so that copying runs at the speed of the bus."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, pieces: Pieces) -> Pieces:
        """Called between steps; returns once the originals may change."""
        on_gpu = any(piece.tensor.is_cuda for part in pieces.values() for piece in part.values())
        copies = {
            group: {name: piece.of(self._copy(f"{group}/{name}", piece.tensor, on_gpu)) for name, piece in part.items()}
            for group, part in pieces.items()
        }
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _copy(self, key: str, tensor: Tensor, pinned: bool) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return buffer.copy_(tensor, non_blocking=pinned)


class Background:
    """Runs a job that ends in a path or in an error."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._result: Path | BaseException | None = None

    def start(self, job: Callable[[], Path], *, beside: bool = True) -> None:
        """The one before has been waited for. Not `beside`: the job is done when this returns."""
        assert self._thread is None

        def run() -> None:
            try:
                self._result = job()
            except BaseException as error:  # whoever waits for it deals with it
                self._result = error

        if not beside:
            run()
            return
        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> Path | BaseException | None:
        """What became of the job, once; None if there was none, or it is not done after so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return None
        self._thread = None
        result, self._result = self._result, None
        return result
