"""Processes that fill batches together.

A batch is a slot of memory shared with the workers; every worker fills its own rows of every batch, so the first batch
is ready early and memory does not grow with the number of workers. Rows are pure functions of (epoch, index)
(`MakeRow`), so a worker that dies can be replaced and its rows made again: that is done once, then the loader stops.

Workers import no torch and touch no accelerator. On Linux they are forked, which takes milliseconds and shares the
list of files, unless CUDA runs already; then, and elsewhere, they start afresh.
"""

import contextlib
import logging
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import reduction, util
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastmim.data.errors import WorkerError, printable
from fastmim.data.pipeline import Made, MakeRow

_log = logging.getLogger("fastmim.data")
_PATIENCE_SECONDS = 60.0  # a worker silent for so long is mentioned
_RESTARTS = 1

Task = tuple[int, int]  # (epoch, index)


class Batches(Protocol):
    """Batches made in the order in which they are asked for."""

    ahead: int  # how many batches may be asked for before one is taken

    def ask(self, tasks: Sequence[Task]) -> None: ...

    def take(self) -> tuple[NDArray[np.uint8], list[Made]]:
        """The oldest batch asked for. Its memory is good until the next `ask`."""
        ...

    def close(self) -> None: ...


class InProcess:
    """No workers: a batch is made when it is taken."""

    ahead = 1

    def __init__(self, make: MakeRow, shape: tuple[int, ...]) -> None:
        self._make = make
        self._rows = np.zeros(shape, dtype=np.uint8)
        self._asked: deque[Sequence[Task]] = deque()

    def ask(self, tasks: Sequence[Task]) -> None:
        self._asked.append(tasks)

    def take(self) -> tuple[NDArray[np.uint8], list[Made]]:
        tasks = self._asked.popleft()
        return self._rows[: len(tasks)], [self._make(self._rows[i], *task) for i, task in enumerate(tasks)]

    def close(self) -> None:
        self._asked.clear()


class _Shared:
    """Bytes shared among processes. Anonymous, so a small /dev/shm (containers) is no limit."""

    def __init__(self, size: int) -> None:
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("fastmim")
        else:
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
        os.ftruncate(self._file, size)
        self._map()

    def _map(self) -> None:
        self.bytes = np.frombuffer(mmap.mmap(self._file, os.fstat(self._file).st_size), dtype=np.uint8)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._file)

    def __getstate__(self) -> Any:
        return reduction.DupFd(self._file)

    def __setstate__(self, state: Any) -> None:
        self._file = state.detach()
        self._map()


class _Slots:
    """`slots` batches of `shape` [B, C, H, W], and which image each worker is at."""

    def __init__(self, slots: int, shape: tuple[int, ...], workers: int) -> None:
        self._shape = (slots, *shape)
        self._workers = workers
        self._shared = _Shared(8 * workers + int(np.prod(self._shape)))

    def at(self) -> NDArray[np.int64]:
        return self._shared.bytes[: 8 * self._workers].view(np.int64)

    def rows(self) -> NDArray[np.uint8]:
        return self._shared.bytes[8 * self._workers :].reshape(self._shape)


class _Worker:
    """One process, seen from the training process."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: BaseProcess | None = None
        self.pipe: Any = None
        self.unanswered: deque[tuple[int, int, Sequence[Task]]] = deque()  # (slot, first row, tasks)


class WorkerPool:
    """`workers` processes; at most `ahead` batches of `shape` [B, C, H, W] under way."""

    def __init__(
        self,
        make: MakeRow,
        shape: tuple[int, ...],
        workers: int,
        ahead: int,
        paths: Callable[[int], str] = str,
        start_method: str | None = None,
    ) -> None:
        """`paths` names an image by its index, for messages; `start_method` is multiprocessing's, chosen when None."""
        self.ahead = ahead
        self._make = make
        self._paths = paths
        self._method = start_method or _start_method()
        self._slots = _Slots(ahead, shape, workers)
        self._rows = self._slots.rows()
        self._at = self._slots.at()
        self._asked: deque[tuple[int, int]] = deque()  # (slot, number of rows)
        self._next_slot = 0
        self._restarts = 0
        self._workers = [_Worker(number) for number in range(workers)]
        # Runs before multiprocessing's own clean-up, which would wait for workers that still wait for work.
        self._finalizer = util.Finalize(self, _end, args=(self._workers,), exitpriority=100)
        for worker in self._workers:
            self._start(worker)

    def ask(self, tasks: Sequence[Task]) -> None:
        slot = self._next_slot
        self._next_slot = (slot + 1) % self.ahead
        self._asked.append((slot, len(tasks)))
        for worker, (first, last) in zip(self._workers, self._shares(len(tasks)), strict=True):
            if first < last:
                message = (slot, first, tasks[first:last])
                worker.unanswered.append(message)
                self._send(worker, message)

    def take(self) -> tuple[NDArray[np.uint8], list[Made]]:
        slot, count = self._asked.popleft()
        made: list[Made] = []
        for worker, (first, last) in zip(self._workers, self._shares(count), strict=True):
            if first < last:
                made.extend(self._receive(worker))
        return self._rows[slot, :count], made

    def close(self) -> None:
        """End the workers. Batches not taken are dropped."""
        self._finalizer()
        self._asked.clear()

    def _shares(self, count: int) -> list[tuple[int, int]]:
        workers = len(self._workers)
        return [(count * w // workers, count * (w + 1) // workers) for w in range(workers)]

    def _start(self, worker: _Worker) -> None:
        context = multiprocessing.get_context(self._method)
        if self._method == "forkserver":
            context.set_forkserver_preload([__name__])
        worker.pipe, theirs = context.Pipe()
        # A forked child holds copies of our ends of all pipes: it must close them, or nobody would notice an end.
        ours = [other.pipe for other in self._workers if other.pipe is not None] if self._method == "fork" else []
        process = context.Process(  # type: ignore[attr-defined]
            target=_work,
            args=(worker.number, theirs, ours, self._make, self._slots),
            name=f"fastmim data worker {worker.number}",
            daemon=True,
        )
        with warnings.catch_warnings():
            # "fork in a multi-threaded process": the worker calls nothing that could need another thread's lock.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        worker.process = process

    def _send(self, worker: _Worker, message: tuple[int, int, Sequence[Task]]) -> None:
        with contextlib.suppress(OSError):  # a dead worker is dealt with where its answer is awaited
            worker.pipe.send(message)

    def _receive(self, worker: _Worker) -> list[Made]:
        while True:
            try:
                if not worker.pipe.poll(_PATIENCE_SECONDS):
                    _log.warning(
                        "still waiting for data worker %d, which reads %s", worker.number, self._reading(worker)
                    )
                    continue
                answer = worker.pipe.recv()
            except (EOFError, OSError):
                self._restart(worker)
                continue
            worker.unanswered.popleft()
            if isinstance(answer, str):
                raise WorkerError(
                    f"Data worker {worker.number} failed while it read {self._reading(worker)}:\n{answer.rstrip()}"
                )
            return answer

    def _reading(self, worker: _Worker) -> str:
        return printable(self._paths(int(self._at[worker.number])))

    def _restart(self, worker: _Worker) -> None:
        assert worker.process is not None
        worker.process.join(10)
        code = worker.process.exitcode
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"ended with code {code}"
        )
        what = f"data worker {worker.number} (process {worker.process.pid}) {how} while it read {self._reading(worker)}"
        if self._restarts == _RESTARTS:
            raise WorkerError(
                f"{what[0].upper()}{what[1:]}. A worker was restarted before, so this is no accident. "
                "If memory ran out, use fewer --data.workers or a smaller --data.max_pixels."
            )
        self._restarts += 1
        _log.warning("%s; it is started again", what)
        worker.pipe.close()
        worker.pipe = None
        self._start(worker)
        for message in worker.unanswered:
            self._send(worker, message)


def _start_method() -> str:
    if sys.platform != "linux":
        return "spawn"
    torch = sys.modules.get("torch")
    return "forkserver" if torch is not None and torch.cuda.is_initialized() else "fork"


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        if worker.pipe is not None:
            worker.pipe.close()
    for worker in workers:
        if worker.process is not None:
            worker.process.kill()  # it holds nothing that needs putting away
            worker.process.join()


def _work(number: int, pipe: Any, ours: list[Any], make: MakeRow, slots: _Slots) -> None:
    """A worker's life: fill the rows asked for until the training process is gone."""
    for other in ours:
        other.close()
    # Ctrl-C and SIGTERM reach the whole process group; when to stop is for the training process to say.
    for number_of_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_of_signal, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF and the like: thousands of lines, and harmless
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # for sources that use it
    rows, at = slots.rows(), slots.at()
    parent = os.getppid()
    while True:
        try:
            while not pipe.poll(5):
                if os.getppid() != parent:
                    return
            slot, first, tasks = pipe.recv()
            made: list[Made] | str = []
            try:
                for row, (epoch, index) in enumerate(tasks, first):
                    at[number] = index
                    made.append(make(rows[slot, row], epoch, index))  # type: ignore[union-attr]
            except Exception:
                made = traceback.format_exc()
            pipe.send(made)
        except (EOFError, OSError):
            return


def create_batches(
    make: MakeRow, shape: tuple[int, ...], workers: int, ahead: int, paths: Callable[[int], str]
) -> Batches:
    """Batches of `shape` [B, C, H, W] made by `workers` processes, or here when that is 0."""
    if workers == 0:
        return InProcess(make, shape)
    return WorkerPool(make, shape, min(workers, shape[0]), ahead, paths)
