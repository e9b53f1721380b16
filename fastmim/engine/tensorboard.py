"""TensorBoard events, where TensorBoard is installed and the disk plays along; else one warning."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


def create_board(wanted: bool, folder: Path, step: int) -> "TensorBoard":
    """`step` is the step resumed from: events after it are hidden from earlier files."""
    if not wanted:
        return TensorBoard(None)
    try:
        from torch.utils.tensorboard import SummaryWriter

        return TensorBoard(SummaryWriter(str(folder), purge_step=step + 1))  # type: ignore[no-untyped-call]
    except ImportError as error:
        logger.warning("No TensorBoard events: %s. pip install tensorboard, or give --log.tensorboard false.", error)
    except OSError as error:
        logger.warning("No TensorBoard events: %s", error)
    return TensorBoard(None)


class TensorBoard:
    """Scalars and pictures, to a SummaryWriter or, with None, nowhere."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def scalars(self, values: Mapping[str, float | int | None], step: int) -> None:
        def write() -> None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(f"train/{name}", value, step)

        self._try(write)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """`pixels` is [H, W, 3] uint8."""
        self._try(lambda: self._writer.add_image(name, pixels, step, dataformats="HWC"))

    def close(self) -> None:
        self._try(lambda: self._writer.close())

    def _try(self, write: Callable[[], None]) -> None:
        if self._writer is None:
            return
        try:
            write()
        except Exception as error:  # a writer's thread hands on whatever it died of
            logger.warning("TensorBoard events stop here (%s); the run goes on without them.", error)
            self._writer = None
