"""Any folder of images: flat, or one folder per class.

Found recursively by extension, in the byte order of their paths, whatever the locale or the file system. Links to
folders are followed, each folder is entered once, so a loop ends. Names may be any bytes. Names that begin with a dot
(and the "._photo.jpg" that some systems leave beside each photo) are passed over.

Names listed in `.fastmim-exclude.txt` at the top of the folder, or in the file that `data.exclude` names, are left out:
one a line, relative to the folder. `python -m fastmim.data.verify` writes such a list.

Labels: when the folder holds images itself, or everything lies in a single sub-folder, there are none. Otherwise the
first-level folders that hold images are the classes, in byte order.
"""

import os
from pathlib import Path

import numpy as np

from fastmim.data.config import DataConfig
from fastmim.data.errors import DataError, printable
from fastmim.data.image_files import ImageFiles
from fastmim.data.listing import EXTENSIONS, IMAGES, files_under


class FolderSource(ImageFiles):
    """The images under `cfg.root`; `classes` prescribes the labels instead of deriving them.

    `excluding` False reads the names on the list of excluded ones too. `base` is the folder that names are relative to.
    """

    def __init__(self, cfg: DataConfig, classes: list[str] | None = None, excluding: bool = True) -> None:
        root = _checked(cfg.root)
        self.name = f"folder {printable(str(root))}"
        names = list(files_under(os.fsencode(root), lambda name: bool(IMAGES.search(name))))
        if not names:
            raise DataError(
                f"data.root: no images under {printable(str(root))} "
                f"(looked for {', '.join(ext.decode() for ext in EXTENSIONS)} in it and all its folders)."
            )
        super().__init__(cfg, root, names, excluding)
        self._label([names[i] for i in self.kept], classes)

    def _label(self, names: list[bytes], classes: list[str] | None) -> None:
        folders = [name.split(b"/", 1)[0] if b"/" in name else b"" for name in names]
        found = sorted(set(folders))
        if found[0] == b"" or (len(found) < 2 and classes is None):
            return
        number = {folder: label for label, folder in enumerate(found)}
        numbers = np.array([number[folder] for folder in folders], dtype=np.int64)
        self.label_by([printable(os.fsdecode(folder)) for folder in found], numbers, classes)


def _checked(root: Path | None) -> Path:
    if root is None:
        raise DataError("data.root is not given: say --data.root DIR.")
    root = Path(root).expanduser()
    if not root.exists():
        raise DataError(f"data.root: {printable(str(root))} does not exist.")
    if not root.is_dir():
        raise DataError(f"data.root: {printable(str(root))} is a file, not a folder of images.")
    return root.absolute()
