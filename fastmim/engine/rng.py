"""Random states: as plain data in a checkpoint, and anew at each step."""

import hashlib
import os
import random
from typing import Any

import numpy as np
import torch


def make_deterministic() -> None:
    """Refuse operations without a deterministic implementation."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only costs time


def seed_step(seed: int, step: int, device: torch.device, rank: int = 0) -> None:
    """Make what torch draws in a step (drop-path, dropout) a function of (seed, step, rank) alone.

    So a resumed run draws what the uninterrupted one would have, whatever loader or evaluation drew in between.
    (Not `torch.manual_seed`: it also queues work for every device type there is, each step.)
    """
    digest = hashlib.blake2b(f"{seed}/{rank}/{step}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)


def rng_states(device: torch.device) -> dict[str, Any]:
    """The states of torch's, NumPy's and Python's generators, as JSON-able data."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    states = {
        "torch": _to_hex(torch.get_rng_state()),
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }
    if device.type == "cuda":
        states["cuda"] = _to_hex(torch.cuda.get_rng_state(device))
    return states


def set_rng_states(states: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_states` gave."""
    torch.set_rng_state(_from_hex(states["torch"]))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_from_hex(states["cuda"]), device)


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
