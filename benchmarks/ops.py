"""Speed of operations against plain PyTorch: `python -m benchmarks.ops [OP ...]`; without names, all of them."""

import argparse
import difflib
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.runner import DTYPES, Row, Settings, run_cases, write_rows
from benchmarks.table import show


def list_ops() -> list[str]:
    """Names of the operations that have a benchmark: benchmarks/bench_NAME.py."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"one or more of: {', '.join(list_ops()) or 'none yet'}")
    parser.add_argument("--quick", action="store_true", help="tiny cases, a few rounds: does everything run?")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    add_machine_options(parser)
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["fp32"], help="default: fp32")
    parser.add_argument(
        "--mask-ratio", nargs="+", type=float, metavar="SHARE", help="removed shares, for operations on tiles"
    )
    parser.add_argument(
        "--seconds-per-case", type=float, default=None, help="for each case and pass; default 3, quick 0.05"
    )
    return parser


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: as torch chooses")


def prepare_machine(options: argparse.Namespace) -> torch.device:
    """The device asked for, with the threads asked for.

    Raises:
        ValueError: a device that is not there, or threads below 1.
    """
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads {options.threads}: at least 1 is needed")
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: no CUDA device is available here; use --device cpu")
    return device


def check_mask_ratios(ratios: Sequence[float], names: Sequence[str]) -> tuple[float, ...]:
    """The removed shares asked for.

    Raises:
        ValueError: one that is no share, or an operation whose benchmark has no mask of tiles.
    """
    for ratio in ratios:
        if not 0 <= ratio < 1:
            raise ValueError(f"mask ratio {ratio:g}: a removed share is at least 0 and below 1")
    for name in names:
        if not hasattr(importlib.import_module(f"benchmarks.bench_{name}"), "MASK_RATIOS"):
            raise ValueError(f"{name}: its benchmark has no mask ratio to set")
    return tuple(ratios)


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def choose(wanted: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """The names wanted, or all when none are given; an unknown one is answered with the nearest.

    Raises:
        ValueError: a name that is not known.
    """
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none yet'}"
            raise ValueError(f"unknown {what} '{name}'; {hint}")
    return list(wanted or known)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        device = prepare_machine(options)
        names = choose(options.ops, list_ops(), "operation")
        ratios = check_mask_ratios(options.mask_ratio, names) if options.mask_ratio else None
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"benchmarks.ops: {error}", file=sys.stderr)
        return 2
    settings = Settings(
        device=device,
        dtypes=tuple(DTYPES[name] for name in options.dtype),
        quick=options.quick,
        seconds=options.seconds_per_case or (0.05 if options.quick else 3.0),
        mask_ratios=ratios,
    )
    command = command_line("benchmarks.ops", arguments)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        """The file holds every finished row at any time, so an interrupted run is not lost."""
        rows.append(row | {"command": command})
        if options.json:
            write_rows(rows, options.json)

    failures: list[str] = []
    for name in names:
        try:
            cases = list(importlib.import_module(f"benchmarks.bench_{name}").cases(settings))
        except ImportError as error:
            failures.append(f"{name}: {error}")
            continue
        failures += run_cases((case for case in cases if options.case in case.case), settings, keep)[1]
    show(rows)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
