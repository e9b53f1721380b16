"""A run's output folder: its layout, its lock, and how the run ended."""

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from fastmim.engine.distributed import World
from fastmim.engine.errors import BUG, DONE, RunFolderError, exit_code
from fastmim.engine.logs import start_logs, stop_logs
from fastmim.engine.signals import RaisingSignals

logger = logging.getLogger(__name__)

_LOCK = "run.lock"
_OURS = (
    "config.yaml",
    "train.log",
    "metrics.jsonl",
    "exit.json",
    "nonfinite.json",
    "evaluation.json",
    "tensorboard",
    "checkpoints",
    "pictures",
    "export",
)
_held: set[Path] = set()  # folders that this very process holds: record locks do not exclude their own process


class RunFolder:
    """config.yaml, train.log, metrics.jsonl, exit.json, tensorboard/, checkpoints/, pictures/, export/.

        with RunFolder(out, fresh=resume == "never") as run:
            run.write("config.yaml", text)
            Trainer(method, loader, run, ...).fit()

    While entered, the folder is locked, log lines of the package go to train.log and the terminal; on leaving,
    exit.json gets the exit code and the reason. With `fresh`, what an earlier run wrote moves to previous-1/ (2, ...).

    Of several processes (`world`) the main one does all that; the others add their warnings and errors to train.log.

    Raises:
        RunFolderError: exit code 2: another run holds the folder, or it cannot be written.
    """

    def __init__(self, path: str | Path, *, fresh: bool = False, world: World | None = None) -> None:
        self.path = Path(path)
        self.world = world or World()
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.export = self.path / "export"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self._fresh = fresh
        self._lock: TextIO | None = None
        self._handlers: list[logging.Handler] = []
        self._signals = RaisingSignals()
        self._news: list[str] = []  # to be logged once there is a log

    def __enter__(self) -> "RunFolder":
        self.world.from_main(self._prepare)
        try:
            self.path.mkdir(parents=True, exist_ok=True)  # another machine may not share it
            self._handlers = start_logs(self.path / "train.log", self.world.rank)
        except OSError as error:
            self._release()
            raise RunFolderError(f"out: {self.path} cannot be written ({error.strerror})") from None
        if self.world.heartbeat is not None:
            self.world.heartbeat.last_words = self.end
        self._signals.__enter__()
        for line in self._news:
            logger.info(line)
        return self

    def _prepare(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if self._fresh:
                self._set_aside()
            for folder in (self.checkpoints, self.pictures):
                folder.mkdir(exist_ok=True)
            (self.path / "exit.json").unlink(missing_ok=True)
        except OSError as error:
            self._release()
            raise RunFolderError(f"out: {self.path} cannot be written ({error.strerror})") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.world.ignore_signals()
        lost = self.world.name_lost(error)
        ending = error if lost is None else lost
        code = exit_code(ending)
        reason = "done" if ending is None else str(ending) or type(ending).__name__
        if code == BUG:
            logger.error("%s", reason, exc_info=error, extra={"file_only": True})
        elif code != DONE:
            level = logging.WARNING if lost is not None else logging.INFO
            logger.log(level, "exit code %d: %s", code, reason, extra={"file_only": True})
        self.end(code, reason)
        stop_logs(self._handlers)
        if self.world.size == 1:
            self._signals.__exit__(kind, error, trace)
        self._release()
        if lost is not None:
            raise lost from None

    def end(self, code: int, reason: str) -> None:
        """Write exit.json. On leaving this is done anyway; for those who end the process by other means."""
        if not self.world.is_main:
            return
        facts = {"code": code, "reason": reason, "time": time.strftime("%FT%T%z")}
        try:
            self.write("exit.json", json.dumps(facts) + "\n")
        except OSError as trouble:
            logger.warning("exit.json cannot be written: %s", trouble.strerror)

    def write(self, name: str, text: str) -> Path:
        """Write a small text file of the folder, whole or not at all."""
        path = self.path / name
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return path

    def _take_lock(self) -> None:
        """Hold a record lock: the kernel frees it with this process however that ends, and forked workers have none."""
        path = self.path.resolve()
        if path in _held:
            raise RunFolderError(f"out: {self.path} is in use by a run of this very process")
        file = (self.path / _LOCK).open("a+", encoding="utf-8")
        file.seek(0)
        holder = file.read()
        if holder:
            self._news.append(f"The lock of {_describe(holder)}, which ended without releasing it, is taken over.")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise RunFolderError(
                    f"out: {self.path} is in use by {_describe(holder)}; choose another --out"
                ) from None
            self._news.append(f"No lock protects {self.path}: its file system has none ({error.strerror}).")
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%FT%T%z")}))
        file.flush()
        self._lock = file
        _held.add(path)

    def _release(self) -> None:
        if self._lock is not None:
            try:
                self._lock.truncate(0)
                self._lock.close()
            except OSError:
                pass  # the kernel frees it with the process
            self._lock = None
            _held.discard(self.path.resolve())

    def _set_aside(self) -> None:
        old = [self.path / name for name in _OURS if (self.path / name).exists()]  # a user's other files stay
        if not old:
            return
        number = 1
        while (self.path / f"previous-{number}").exists():
            number += 1
        target = self.path / f"previous-{number}"
        target.mkdir()
        for entry in old:
            shutil.move(entry, target / entry.name)


def is_locked(folder: Path) -> bool:
    """Whether a living process holds this folder."""
    if folder.resolve() in _held:
        return True
    try:
        with (folder / _LOCK).open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go as the file is closed
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def _describe(holder: str) -> str:
    try:
        facts = json.loads(holder)
        return f"process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (ValueError, KeyError, TypeError):
        return "another run"
