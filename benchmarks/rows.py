"""Rows of results: their keys, and JSON files that are never half written."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

KEYS = (
    "op",
    "case",
    "pass",
    "dtype",
    "backend",
    "ms",
    "baseline",
    "baseline_ms",
    "ratio",
    "peak_mb",
    "baseline_peak_mb",
)  # in every row; a row may have more

Row = dict[str, Any]


def write_rows(rows: list[Row], path: Path | str) -> None:
    """Writes a JSON list, complete or not at all: a temporary file in the same folder, then a rename."""
    path = Path(path)
    for row in rows:
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise ValueError(f"a row of {row.get('op', 'a benchmark')} lacks {', '.join(missing)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_rows(path: Path | str) -> list[Row]:
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as benchmark rows ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and all(k in row for k in KEYS) for row in rows):
        raise ValueError(f"{path}: expected a list of rows with the keys {', '.join(KEYS)}")
    return rows
