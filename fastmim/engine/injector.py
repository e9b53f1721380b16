"""Faults on demand, for tests: FASTMIM_INJECT="kind@where=number[,kind@where=number...]". Unset, it does nothing.
"kind@where=number:rank" happens in that process of a run only; nothing happens again once a launcher restarted it.

kind   raise, sigint, sigterm, sigkill, enospc, eio; nan is returned to the caller, who spoils its numbers
where  step (before it), loss, grad: number is the step, counted from 1;
       checkpoint_write (before each file), rename: number is the how-manieth in this process, "2-" all from there
"""

import errno
import os
import signal
from collections import Counter
from dataclasses import dataclass

_KINDS = ("raise", "sigint", "sigterm", "sigkill", "enospc", "eio", "nan")
_WHERE = ("step", "loss", "grad", "checkpoint_write", "rename")


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


def inject(where: str, number: int | None = None) -> bool:
    """Let a fault happen here if one was asked for. True: the caller is to put NaN into what it holds."""
    if not _faults:
        return False
    _seen[where] += 1
    number = _seen[where] if number is None else number
    spoil = False
    for fault in _faults:
        if fault.where == where and fault.first <= number <= fault.last:
            spoil |= _happen(fault)
    return spoil


def _happen(fault: _Fault) -> bool:
    if fault.kind == "raise":
        raise RuntimeError(f"injected at {fault.where}")
    if fault.kind in ("enospc", "eio"):
        number = errno.ENOSPC if fault.kind == "enospc" else errno.EIO
        raise OSError(number, f"{os.strerror(number)} (injected at {fault.where})")
    if fault.kind != "nan":
        os.kill(os.getpid(), getattr(signal, fault.kind.upper()))
    return fault.kind == "nan"
