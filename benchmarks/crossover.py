"""From which mask ratio on tiles win: `python -m benchmarks.crossover [masked_conv masked_encoder] [--json FILE]`.

Every row is measured at each mask ratio, from nothing removed upwards. Its crossover is the smallest ratio from which
tiles are at least as fast as the baseline, also at every larger one measured: linear between the measured ratio where
they last lose and the next. Ratios are those of whole cells, (N - K) / N.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.ops import add_machine_options, check_mask_ratios, choose, command_line, prepare_machine
from benchmarks.runner import DTYPES, Row, Settings, run_cases, write_rows
from benchmarks.table import show

OPERATIONS = ("masked_conv", "masked_encoder", "masked_pool", "tiles")
DEFAULT = ("masked_conv", "masked_encoder")
RATIOS = tuple(i / 10 for i in range(10))

_NAMED = ("op", "pass", "dtype", "backend", "baseline")
_KEPT = ("hardware", "torch", "load_average")


def crossover(points: Sequence[tuple[float, float]]) -> float | None:
    """The mask ratio from which on tiles win, None where they lose at the largest.

    Args:
        points: (mask ratio, baseline's time / ours), in any order.
    """
    lost: tuple[float, float] | None = None
    won: tuple[float, float] | None = None
    for point in sorted(points):
        if point[1] < 1:
            lost, won = point, None
        elif won is None:
            won = point
    if lost is None or won is None:
        return None if won is None else won[0]
    return lost[0] + (won[0] - lost[0]) * (1 - lost[1]) / (won[1] - lost[1])


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row for each thing measured, whatever the ratio: `crossover`, and `points` [[mask ratio, ratio], ...]."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        case = re.sub(r" mask \d+%", "", row["case"])
        groups.setdefault((case, *(str(row[key]) for key in _NAMED)), []).append(row)
    found = []
    for (case, *_), group in groups.items():
        points = sorted((row["mask_ratio"], row["ratio"]) for row in group)
        at, last = crossover(points), points[-1][0]
        found.append(
            {key: group[-1][key] for key in _NAMED}
            | {"case": case}
            | dict.fromkeys(("ms", "baseline_ms", "ratio", "peak_mb", "baseline_peak_mb"))
            | {"crossover": at, "wins_from": f"{at:.0%}" if at is not None else f"not up to {last:.0%}"}
            | {"points": [list(point) for point in points]}
            | {key: group[-1][key] for key in _KEPT if key in group[-1]}
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crossover", description=__doc__)
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help=f"of {', '.join(OPERATIONS)}; default: {' '.join(DEFAULT)}"
    )
    parser.add_argument("--quick", action="store_true", help="tiny cases, three ratios: does everything run?")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    add_machine_options(parser)
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["fp32"], help="default: fp32")
    parser.add_argument(
        "--mask-ratio", nargs="+", type=float, metavar="SHARE", help="the ratios measured; default: 0 0.1 ... 0.9"
    )
    parser.add_argument(
        "--seconds-per-case", type=float, default=None, help="for each case, ratio and pass; default 2, quick 0.02"
    )
    return parser


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call before each case with its name: a bar on a terminal where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda name: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task, started = progress.add_task("", total=total), 0

        def next_case(name: str) -> None:
            nonlocal started
            progress.update(task, completed=started, description=name)
            started += 1

        yield next_case
        progress.update(task, completed=total, description="")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        device = prepare_machine(options)
        names = choose(options.ops or DEFAULT, OPERATIONS, "operation on tiles")
        ratios = check_mask_ratios(options.mask_ratio or ((0.0, 0.3, 0.6) if options.quick else RATIOS), names)
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"benchmarks.crossover: {error}", file=sys.stderr)
        return 2
    settings = Settings(
        device=device,
        dtypes=tuple(DTYPES[name] for name in options.dtype),
        quick=options.quick,
        seconds=options.seconds_per_case or (0.02 if options.quick else 2.0),
        mask_ratios=tuple(sorted(set(ratios))),
    )
    command = command_line("benchmarks.crossover", arguments)
    cases = [case for name in names for case in importlib.import_module(f"benchmarks.bench_{name}").cases(settings)]
    cases = [case for case in cases if options.case in case.case]
    measured: list[Row] = []

    def keep(row: Row) -> None:
        """The file holds what is known at any time, so an interrupted run is not lost."""
        measured.append(row)
        if options.json:
            write_rows([found | {"command": command} for found in summarise(measured)], options.json)

    with _progress(len(cases)) as next_case:

        def announced() -> Iterator[Case]:
            for case in cases:
                next_case(f"{case.op} {case.case}")
                yield case

        failures = run_cases(announced(), settings, keep)[1]
    show(summarise(measured))
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures or not measured else 0


if __name__ == "__main__":
    raise SystemExit(main())
