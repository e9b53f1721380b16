"""Several processes of a run, each with a `World` as torchrun would give it, without torchrun's start-up."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from fastmim.engine import World


def in_processes(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """`function(world, *arguments)` in each of `size` processes; an error of one is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (size, port, function, arguments), nprocs=size)


def _process(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    facts = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in facts.items()})
    with World.from_environment("cpu", timeout=60) as world:
        function(world, *arguments)
