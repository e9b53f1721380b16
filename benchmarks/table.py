"""Results as a table, so that figures are never typed by hand: `python -m benchmarks.table FILE ... [--into PAGE]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import Row, read_rows

_COLUMNS: list[tuple[str, str]] = [
    ("op", "op"),
    ("case", "case"),
    ("pass", "pass"),
    ("dtype", "dtype"),
    ("backend", "backend"),
    ("ms", "ms"),
    ("baseline", "baseline"),
    ("baseline_ms", "baseline ms"),
    ("ratio", "ratio"),
    ("wins_from", "wins from mask ratio"),
    ("peak_mb", "peak MB"),
    ("baseline_peak_mb", "baseline MB"),
    ("images_per_second", "img/s"),
    ("data_wait", "waiting"),
    ("gb_per_s", "GB/s"),
    ("roofline", "of ceiling"),
]


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if key == "ratio":
        return f"{value:.2f}x"
    if key in ("roofline", "data_wait"):
        return f"{100 * value:.0f} %"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[bool]]:
    """Headings, texts, and which columns hold numbers; columns that would be empty are left out."""
    used = [(key, title) for key, title in _COLUMNS if any(row.get(key) is not None for row in rows)]
    numeric = [all(isinstance(row.get(key), (int, float, type(None))) for row in rows) for key, _ in used]
    return [title for _, title in used], [[_text(row, key) for key, _ in used] for row in rows], numeric


def plain(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal or a log file."""
    if not rows:
        return "no rows"
    titles, lines, numeric = cells(rows)
    widths = [max(len(line[i]) for line in [titles, *lines]) for i in range(len(titles))]

    def align(line: list[str]) -> str:
        parts = [t.rjust(w) if n else t.ljust(w) for t, w, n in zip(line, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([align(titles), "  ".join("-" * w for w in widths), *map(align, lines)])


def markdown(rows: Sequence[Row]) -> str:
    """A table for a README, with a line that says what was measured, with what."""
    if not rows:
        return "no rows"
    titles, lines, numeric = cells(rows)
    rule = ["---:" if n else "---" for n in numeric]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [titles, rule, *lines])
    where = sorted({f"{row.get('hardware', 'unknown hardware')}, torch {row.get('torch', '?')}" for row in rows})
    return f"{table}\n\nMeasured on {'; '.join(where)}."


def show(rows: Sequence[Row]) -> None:
    """Prints the table; in colour where rich is installed and the output is a terminal."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            titles, lines, numeric = cells(rows)
            table = Table()
            for title, is_number in zip(titles, numeric, strict=True):
                table.add_column(title, justify="right" if is_number else "left")
            for line in lines:
                table.add_row(*line)
            Console().print(table)
            return
    print(plain(rows))


def put_into(page: Path, mark: str, text: str) -> None:
    """Replaces what lies between the lines `<!-- begin MARK -->` and `<!-- end MARK -->` of a Markdown page.

    Raises:
        ValueError: a page without such lines.
    """
    begin, end = f"<!-- begin {mark} -->\n", f"<!-- end {mark} -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page}: has no lines {begin.strip()} and {end}")
    page.write_text(f"{before}{begin}{text}\n{end}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON written with --json by a benchmark")
    parser.add_argument("--format", choices=("markdown", "plain"), default="markdown")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put the table into a Markdown page, see --mark")
    parser.add_argument("--mark", default="results", help="between <!-- begin MARK --> and <!-- end MARK -->")
    parser.add_argument("--pass", dest="passes", nargs="+", help="only these passes")
    parser.add_argument("--op", dest="ops", nargs="+", help="only these operations or methods")
    options = parser.parse_args(arguments)
    try:
        rows = [row for file in options.files for row in read_rows(file)]
        rows = [r for r in rows if not options.passes or r["pass"] in options.passes]
        rows = [r for r in rows if not options.ops or r["op"] in options.ops]
        text = markdown(rows) if options.format == "markdown" else plain(rows)
        if options.into:
            put_into(options.into, options.mark, text)
        else:
            print(text)
    except (ValueError, OSError) as error:
        print(f"benchmarks.table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
