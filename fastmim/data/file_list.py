"""A text file that names the images: one path a line, relative to the folder of the file (or absolute).

Where every line ends with a whole number after a space or tab ("n01440764/10026.jpeg 0", as DALI's and caffe's lists
have it), these are the labels. Empty lines are passed over. Names may be any bytes.
"""

from pathlib import Path

import numpy as np

from fastmim.data.config import DataConfig
from fastmim.data.errors import DataError, printable
from fastmim.data.image_files import ImageFiles

_LOOKED_AT = 100  # files, of which one has to exist


class FileListSource(ImageFiles):
    """The images that the file `cfg.root` names, in its order."""

    def __init__(self, cfg: DataConfig, classes: list[str] | None = None, excluding: bool = True) -> None:
        assert cfg.root is not None
        path = cfg.root.expanduser().absolute()
        self.name = f"list {printable(str(path))}"
        names, labels = _read(path)
        super().__init__(cfg, path.parent, names, excluding)
        looked_at = min(len(self), _LOOKED_AT)
        if not any(Path(self.path(index)).is_file() for index in range(looked_at)):
            raise DataError(
                f"data.root: of the first {looked_at} files that {printable(str(path))} names none exists; the first "
                f"is {printable(self.path(0))}. Paths are relative to the folder of the list."
            )
        if labels is None:
            return
        found, numbers = np.unique(np.array(labels)[self.kept], return_inverse=True)
        if len(found) > 1 or classes is not None:
            self.label_by([str(label) for label in found.tolist()], numbers, classes)


def _read(path: Path) -> tuple[list[bytes], list[int] | None]:
    """Names, and labels where every line has one.

    Raises:
        DataError: the file cannot be read, or names nothing.
    """
    try:
        lines = [line.rstrip(b"\r") for line in path.read_bytes().split(b"\n")]
    except OSError as error:
        raise DataError(f"data.root: {printable(str(path))} cannot be read: {error.strerror}.") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise DataError(f"data.root: {printable(str(path))} names no images; it should have one path a line.")
    pairs = [line.rsplit(None, 1) for line in lines]
    if all(len(pair) == 2 and pair[1].isdigit() and len(pair[1]) <= 18 for pair in pairs):
        return [pair[0] for pair in pairs], [int(pair[1]) for pair in pairs]
    return lines, None
