"""How the processes of a run find each other: through the launcher's key-value store, on a page of their own.

A launcher that restarts a run may give it the store of the attempt before, full of addresses of processes that are
dead (torch's own start-up reads them again). Attempts cannot be told apart by anything that all machines see alike, so
the main process draws a name for this one and hands it to whoever greets it with a fresh word.
"""

import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastmim.engine.errors import ProcessLost

__all__ = ["meet"]


def meet(rank: int, size: int, timeout: float) -> Any:
    """The store of this attempt, once all `size` processes are there. Reads MASTER_ADDR and MASTER_PORT.

    Raises:
        ProcessLost: some did not come within `timeout` seconds.
    """
    patience = timedelta(seconds=timeout)
    store, _, _ = next(iter(dist.rendezvous("env://", rank=rank, world_size=size, timeout=patience)))
    lobby = dist.PrefixStore("fastmim", store)
    deadline = time.monotonic() + timeout
    if rank == 0:
        name = secrets.token_hex(8)
        _welcome(lobby, name, size, deadline)
    else:
        word = secrets.token_hex(8)
        lobby.set(f"hello/{rank}", word)
        _until(lambda: lobby.check([f"welcome/{word}"]), deadline, "rank 0 does not answer")
        name = lobby.get(f"welcome/{word}").decode()
        lobby.set(f"here/{name}/{rank}", "1")
    return dist.PrefixStore(f"fastmim/{name}", store)


def _welcome(lobby: Any, name: str, size: int, deadline: float) -> None:
    """Answer every word, also the second one of a rank whose first was left by an earlier attempt."""
    answered: set[bytes] = set()
    missing = list(range(1, size))

    def all_here() -> bool:
        missing[:] = [rank for rank in missing if not lobby.check([f"here/{name}/{rank}"])]
        for rank in missing:
            if lobby.check([f"hello/{rank}"]) and (word := lobby.get(f"hello/{rank}")) not in answered:
                lobby.set(f"welcome/{word.decode()}", name)
                answered.add(word)
        return not missing

    try:
        _until(all_here, deadline, "")
    except ProcessLost:
        who = ", ".join(f"rank {rank}" for rank in missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise ProcessLost(f"{who} of {size} processes did not come") from None


def _until(condition: Any, deadline: float, otherwise: str) -> None:
    pause = 0.005
    while not condition():
        if time.monotonic() > deadline:
            raise ProcessLost(otherwise)
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
