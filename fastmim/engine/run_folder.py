"""A run's output folder."""

from pathlib import Path
from types import TracebackType


class RunFolder:
    """config.yaml, train.log, metrics.jsonl, exit.json, tensorboard/, checkpoints/, pictures/, export/.

        with RunFolder(out, fresh=resume == "never") as run:
            run.write("config.yaml", text)
            Trainer(method, loader, run, ...).fit()

    Raises:
        RunFolderError: exit code 2: another run holds the folder, or it is not writable.
    """

    def __init__(self, path: str | Path, *, fresh: bool = False) -> None:
        self.path = Path(path)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def write(self, name: str, text: str) -> Path:
        """Write a small text file atomically."""
        raise NotImplementedError
