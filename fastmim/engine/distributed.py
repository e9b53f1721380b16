"""The processes of a run: who this one is, and what they say to each other.

Started by torchrun (or anything that sets its variables), each process drives one device. A single process has no
process group at all. Imports torch when it is needed, so that a mistake in a command is answered at once.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastmim.engine.errors import DONE, ProcessLost, ToldElsewhere, exit_code

if TYPE_CHECKING:
    from torch import Tensor

    from fastmim.engine.heartbeat import Heartbeat

__all__ = ["World"]

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FAREWELL = 20.0  # seconds that processes wait for each other at the end


class World:
    """This process among those of the run. Without arguments: a run of one process.

        with World.from_environment(device="auto", timeout=600) as world:
            ...

    Collectives on tensors of the device use NCCL on GPUs and gloo on CPUs; what the host has to agree on goes through
    a gloo group of its own or through the store. Every process has to make the same calls in the same order. With one
    process all of them answer at once.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.local_rank = 0, 1, 0
        self.heartbeat: Heartbeat | None = None
        self._host: Any = None  # the gloo group
        self._store: Any = None
        self._timeout = 0.0
        self._calls = 0  # of from_main and collect: names of keys

    @classmethod
    def from_environment(cls, device: str = "auto", timeout: float = 600.0) -> "World":
        """Join the other processes that torchrun's variables tell of.

        Args:
            device: "auto", "cpu" or "cuda", as in the settings.
            timeout: seconds after which waiting for another process ends in an error.

        Raises:
            ValueError: variables that are missing or do not fit each other, or no GPU for this process.
        """
        world = cls()
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1":
            return world
        missing = [name for name in _LAUNCHED if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE is {size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; "
                f"torchrun sets them all, see docs/clusters.md"
            )
        numbers = {name: os.environ[name] for name in _LAUNCHED[:3]}
        if not all(number.isdigit() for number in numbers.values()):
            raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, got {numbers}")
        world.rank, world.size, world.local_rank = (int(number) for number in numbers.values())
        if world.rank >= world.size:
            raise ValueError(f"RANK is {world.rank}, but there are only {world.size} processes (WORLD_SIZE)")
        world._join(device, timeout)
        return world

    def _join(self, device: str, timeout: float) -> None:
        import torch.distributed as dist

        from fastmim.engine.heartbeat import Heartbeat
        from fastmim.engine.meeting import meet
        from fastmim.engine.precision import choose_device

        self._timeout, patience = timeout, timedelta(seconds=timeout)
        chosen = choose_device(device, self.local_rank)
        self._store = store = meet(self.rank, self.size, timeout)
        if chosen.type == "cuda":
            dist.init_process_group(
                "nccl", store=store, rank=self.rank, world_size=self.size, timeout=patience, device_id=chosen
            )
        else:
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=patience)
        self._host = dist.new_group(backend="gloo", timeout=patience)
        self.heartbeat = Heartbeat(self._store, self.rank, self.size, timeout)
        self.heartbeat.start()
        dist.barrier(group=self._host)

    def new_host_group(self) -> Any:
        """A group of all processes for what runs beside training; None where there is one. Called by all together."""
        if self.size == 1:
            return None
        import torch.distributed as dist

        return dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout))

    @property
    def is_main(self) -> bool:
        """Whether this process writes: folder, log, metrics, pictures, checkpoints."""
        return self.rank == 0

    def share(self, batch_size: int, accumulate: int, group: int = 1) -> int:
        """Images of each process in each micro-batch, which are a multiple of `group`.

        Raises:
            ValueError: a batch that cannot be shared so.
        """
        parts = self.size * accumulate
        if batch_size % (parts * group) == 0:
            return batch_size // parts
        if self.size == 1 and group == 1:
            raise ValueError(f"batch_size {batch_size} is not divisible by optim.accumulate {accumulate}")
        below = batch_size // (parts * group) * parts * group
        near = " or ".join(str(n) for n in (below, below + parts * group) if n)
        raise ValueError(
            f"batch_size {batch_size} cannot be shared equally: it is that of all {self.size} processes together, and "
            f"{batch_size} is not divisible by {self.size} processes x {accumulate} micro-batches (optim.accumulate)"
            f"{f' x groups of {group} (method.group_size)' if group > 1 else ''}; {near} would be"
        )

    def largest(self, number: int) -> int:
        """The largest number that any process gives. By the hosts: no device is waited for."""
        return int(self._reduce_on_hosts([number], "MAX")[0]) if self.size > 1 else number

    def any(self, flag: bool) -> bool:
        """Whether it is true for any process."""
        return bool(self.largest(int(flag)))

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Each number, added up over all processes, in fp64 on the hosts."""
        return self._reduce_on_hosts(numbers, "SUM") if self.size > 1 else list(numbers)

    def _reduce_on_hosts(self, numbers: Sequence[float], how: str) -> list[float]:
        import torch
        import torch.distributed as dist

        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, getattr(dist.ReduceOp, how), group=self._host)
        return values.tolist()

    def mean(self, values: "Tensor") -> "Tensor":
        """`values`, on the device, as the mean over all processes."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def agree(self, flag: "Tensor") -> None:
        """Make `flag`, 0 or 1 on the device, 1 in all processes where it is 1 in any."""
        import torch.distributed as dist

        dist.all_reduce(flag, dist.ReduceOp.MAX)

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the main process (JSON), in all. However long it takes there, the others wait.

        Raises:
            ToldElsewhere: in the others, with the exit code of what `make` raised in the main process.
        """
        if self.size == 1:
            return make()
        self._calls += 1
        key = f"main/{self._calls}"
        if not self.is_main:
            answer = json.loads(self._wait_for_main(key))
            if "error" in answer:
                raise ToldElsewhere(answer["error"], answer["code"])
            return answer["value"]
        try:
            value = make()
        except BaseException as error:
            self._store.set(key, json.dumps({"error": str(error) or type(error).__name__, "code": exit_code(error)}))
            raise
        self._store.set(key, json.dumps({"value": value}))
        return value

    def _wait_for_main(self, key: str) -> bytes:
        assert self.heartbeat is not None  # whose thread ends this process should the main one be gone
        pause = 0.002
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            end = self.heartbeat.end_of(0)
            if end is not None and not self._store.check([key]):
                raise ToldElsewhere(f"rank 0 ended with exit code {end['code']}: {end['reason']}", end["code"])
        return self._store.get(key)

    def collect(self, value: Any) -> list[Any]:
        """In the main process: every process's value (JSON), by rank. In the others: their own only."""
        if self.size == 1:
            return [value]
        self._calls += 1
        keys = [f"collect/{self._calls}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(value))
        if not self.is_main:
            return [value]
        self._store.wait(keys, timedelta(seconds=self._timeout))
        values = [json.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return values

    def tensors_from_main(self, groups: Mapping[str, Mapping[str, "Tensor"]] | None) -> dict[str, dict[str, "Tensor"]]:
        """The main process's tensors, in all of them, in CPU memory; the others give None."""
        import torch
        import torch.distributed as dist

        if self.size == 1:
            assert groups is not None
            return {name: dict(group) for name, group in groups.items()}

        def describe() -> list[Any]:
            assert groups is not None
            return [
                [group, name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
                for group, tensors in groups.items()
                for name, tensor in tensors.items()
            ]

        received: dict[str, dict[str, Tensor]] = {}
        for group, name, shape, dtype in self.from_main(describe):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype)) if groups is None else groups[group][name]
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            dist.broadcast(flat, 0, group=self._host)
            received.setdefault(group, {})[name] = flat.view(tensor.dtype).reshape(shape)
        return received

    def __enter__(self) -> "World":
        return self

    def ignore_signals(self) -> None:
        """This process ends now, for a reason to be told: a launcher sends signals to all when the first one ends."""
        if self.size > 1:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)

    def name_lost(self, error: BaseException | None) -> ProcessLost | None:
        """Where `error` came from a collective that another process left: who that was."""
        # torch raises RuntimeError, and its subclasses, for broken and expired connections alike.
        if self.heartbeat is None or not isinstance(error, RuntimeError):
            return None
        return self.heartbeat.who_is_lost(timed_out="imed out" in str(error))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.heartbeat is None:
            return
        self.ignore_signals()
        code, lost = exit_code(error), isinstance(error, ProcessLost)
        caused = not lost and not isinstance(error, ToldElsewhere)
        self.heartbeat.leave(code, str(error) or type(error).__name__ if error else "done", caused=caused)
        self._part(together=error is None or getattr(error, "of_all", False))
        if code == DONE:
            import torch.distributed as dist

            dist.destroy_process_group()

    def _part(self, *, together: bool) -> None:
        """`together`: all end now and wait for each other: the store may live in the main process, and a launcher
        kills what is left after the first process that failed."""
        assert self.heartbeat is not None
        try:
            if self.is_main:
                if together:
                    self.heartbeat.wait_for_ends(_FAREWELL)
                self._store.set("parted", "1")
            elif together:
                self._store.wait(["parted"], timedelta(seconds=_FAREWELL))
        except RuntimeError:
            pass  # gone already
