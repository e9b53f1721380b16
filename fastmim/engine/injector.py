"""Faults on demand, for tests: FASTMIM_INJECT="kind@where=number[,kind@where=number...]". Unset, it does nothing.
"kind@where=number:rank" happens in that process of a run only; nothing happens again once a launcher restarted it.

kind   raise, sigint, sigterm, sigkill, enospc, edquot, eio, estale; stall: waits for ever; clock: the wall clock
       jumps back a day; nan, spike: the caller multiplies its numbers by NaN or by 1000
where  step (before it), loader (before its batch is asked for), forward (within it), loss, grad: number is the step,
       counted from 1;
       checkpoint_write (before each file), rename, prune, capture, eval (before each measurement), export (before each
       file takes its place): number is the how-manieth in this process, "2-" all from there
"""

import errno
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass

_ERRORS = {"enospc": errno.ENOSPC, "edquot": errno.EDQUOT, "eio": errno.EIO, "estale": errno.ESTALE}
_FACTORS = {"nan": float("nan"), "spike": 1000.0}
_KINDS = ("raise", "sigint", "sigterm", "sigkill", "stall", "clock", *_ERRORS, *_FACTORS)
_WHERE = (
    *("step", "loader", "forward", "loss", "grad"),
    *("checkpoint_write", "rename", "prune", "capture", "eval", "export"),
)


@dataclass(frozen=True)
class _Fault:
    kind: str
    where: str
    first: int
    last: int


def _parse(text: str) -> tuple[_Fault, ...]:
    faults = []
    for item in filter(None, text.split(",")):
        kind, _, place = item.strip().partition("@")
        where, _, number = place.partition("=")
        number, _, rank = number.partition(":")
        first, dash, last = number.partition("-")
        if kind not in _KINDS or where not in _WHERE or not first.isdigit():
            raise ValueError(
                f"FASTMIM_INJECT: {item!r} is not kind@where=number[:rank]; kinds {_KINDS}, places {_WHERE}"
            )
        if rank in ("", os.environ.get("RANK", "0")):
            faults.append(_Fault(kind, where, int(first), int(last) if last else (1 << 62) if dash else int(first)))
    return tuple(faults)


_restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
_faults = () if _restarted else _parse(os.environ.get("FASTMIM_INJECT", ""))
_seen: Counter[str] = Counter()


def injecting() -> bool:
    """Whether any fault was asked for."""
    return bool(_faults)


def inject(where: str, number: int | None = None) -> float:
    """Let a fault happen here if one was asked for. Returns what the caller is to multiply its numbers by."""
    if not _faults:
        return 1.0
    _seen[where] += 1
    number = _seen[where] if number is None else number
    factor = 1.0
    for fault in _faults:
        if fault.where == where and fault.first <= number <= fault.last:
            factor *= _happen(fault)
    return factor


def _happen(fault: _Fault) -> float:
    if fault.kind == "raise":
        raise RuntimeError(f"injected at {fault.where}")
    if fault.kind in _ERRORS:
        number = _ERRORS[fault.kind]
        raise OSError(number, f"{os.strerror(number)} (injected at {fault.where})")
    if fault.kind in _FACTORS:
        return _FACTORS[fault.kind]
    if fault.kind == "clock":
        now = time.time
        time.time = lambda: now() - 86_400.0
        return 1.0
    while fault.kind == "stall":
        time.sleep(60)
    os.kill(os.getpid(), getattr(signal, fault.kind.upper()))
    return 1.0
