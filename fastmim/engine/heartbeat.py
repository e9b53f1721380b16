"""Signs of life of a run's processes, in the key-value store that they met at: who is there, who left, who is gone.

A collective that fails says that some connection broke, not whose fault it was. So every process counts up a key of its
own each second, and leaves a last word when it ends; whoever sees a collective fail looks who has done neither. And
because a collective may also wait for ever, each process watches its neighbour: one that gives no sign of life for as
long as the run's timeout ends the run.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastmim.engine.errors import PROCESS_LOST, ProcessLost

logger = logging.getLogger(__name__)

BEAT = 1.0  # seconds between signs of life
_LOOK = 4  # beats in which a living process gives at least one
_MERCY = 5.0  # seconds in which the training thread may end by itself, once a process is known to be lost


class Heartbeat:
    """Beats from `start` to `leave`.

    Args:
        store: a key-value store of the run's processes, with `clone`.
        timeout: seconds without a sign of life after which the neighbour counts as lost.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size = rank, size
        self.last_words: Callable[[int, str], None] | None = None
        """Called with exit code and reason before this process is ended for a lost one."""
        self.where: Callable[[], str] = lambda: "not training"
        """What this process is doing: told with every beat, and to the user should the others wait for it in vain."""
        self._store, self._own = store, store.clone()  # a connection of its own: the other may be waiting
        self._timeout = timeout
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """From here on the others can tell that this process lives. Followed by a barrier, so that all keys exist."""
        self._store.set(f"who/{self.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._store.set(f"beat/{self.rank}", "0")
        self._thread.start()

    def leave(self, code: int, reason: str, *, caused: bool) -> None:
        """The last word. `caused`: this process ends for a reason of its own, not because of another."""
        self._left.set()
        with suppress(RuntimeError):  # the store is gone, nobody can hear it
            self._store.set(f"end/{self.rank}", json.dumps({"code": code, "reason": reason, "caused": caused}))
        self._thread.join(2 * BEAT)

    def wait_for_ends(self, seconds: float) -> None:
        """Wait until all others have left, at most so long: whoever hosts the store goes last."""
        deadline = time.monotonic() + seconds
        keys = [f"end/{rank}" for rank in range(self.size)]
        try:
            while not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.02)
        except RuntimeError:
            pass

    def end_of(self, rank: int) -> dict[str, Any] | None:
        """What this process said as it left, if it did."""
        return json.loads(self._store.get(f"end/{rank}")) if self._store.check([f"end/{rank}"]) else None

    def who_is_lost(self, timed_out: bool = False) -> ProcessLost | None:
        """Called when a collective failed: the processes that ended for a reason of their own, or without a word.

        Takes up to a few seconds, because silence takes time to hear. None: everybody is there, and the collective did
        not time out. If it did, somebody lives and hangs: then what each of them is doing.
        """
        try:
            before = self._beats()
            for _ in range(2 * _LOOK):
                ends = {rank: end for rank in range(self.size) if (end := self.end_of(rank)) is not None}
                caused = {rank: end for rank, end in ends.items() if end["caused"] and end["code"]}
                if caused:
                    rank, end = next(iter(caused.items()))
                    return ProcessLost(f"{self._name(rank)} ended with exit code {end['code']}: {end['reason']}")
                time.sleep(BEAT / 2)
            beats = self._beats()
            silent = [r for r in range(self.size) if beats[r] == before[r] and r not in ends and r != self.rank]
        except RuntimeError:
            return ProcessLost(
                "the store through which the processes meet is gone, so its host (rank 0, or the launcher)"
            )
        if not silent and not timed_out:
            return None
        if not silent:
            doing = (f"{self._name(r)} is {beats[r].decode().partition(' ')[2]}" for r in range(self.size))
            return ProcessLost(
                f"after {self._timeout:g} s (engine.timeout) some process has not answered, though all live; "
                + "; ".join(doing)
            )
        return ProcessLost(f"{' and '.join(map(self._name, silent))} gives no sign of life")

    def _beats(self) -> list[bytes]:
        return [self._store.get(f"beat/{rank}") for rank in range(self.size)]

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._store.get(f'who/{rank}').decode()})"

    def _watch(self) -> None:
        """The thread: beat, and look after the next rank and at what others found."""
        neighbour, count, seen, silent = (self.rank + 1) % self.size, 0, b"", 0
        try:
            while not self._left.wait(BEAT):
                count += 1
                self._own.set(f"beat/{self.rank}", f"{count} {self.where()}")
                beat = self._own.get(f"beat/{neighbour}")
                silent = silent + 1 if beat == seen else 0  # counted in own beats: when all are frozen, nobody is lost
                seen = beat
                if silent * BEAT > self._timeout and not self._own.check([f"end/{neighbour}"]):
                    who = self._own.get(f"who/{neighbour}").decode()
                    self._own.set("lost", f"rank {neighbour} ({who}) gives no sign of life")
                if self._own.check(["lost"]):
                    self._end(self._own.get("lost").decode())
        except RuntimeError as error:
            if not self._left.wait(_MERCY):
                self._end(f"the store through which the processes meet is gone ({str(error).partition(chr(10))[0]})")

    def _end(self, reason: str) -> None:
        """The training thread may wait in a collective that nobody will answer."""
        if self._left.wait(_MERCY):
            return
        lost = str(ProcessLost(reason))
        logger.error("%s", lost)
        if self.last_words is not None:
            self.last_words(PROCESS_LOST, lost)
        os._exit(PROCESS_LOST)
