"""metrics.jsonl: one JSON object per logged step, each step once, whatever happened in between."""

import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step` (they will be done again) and a last line that a kill left torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


class MetricsFile:
    """Appends lines, flushed one by one, to `path` or, with None, nowhere. A disk that refuses costs one warning, not
    the run."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None if path is None else path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, float | int | None]) -> None:
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        except OSError as error:
            logger.warning("metrics.jsonl cannot be written (%s); the run goes on without it.", error.strerror)
            self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # already told
                file.close()
