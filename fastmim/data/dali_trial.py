"""Whether DALI works here: it is given an image that everything decodes."""

import io
from typing import Literal

import numpy as np
import torch
from PIL import Image

from fastmim.data.dali_graph import Graph
from fastmim.data.draws import Box
from fastmim.data.views import ViewSpec

INSTALL = 'pip install "fastmim[dali]"'
_COLOUR = (200, 90, 40)
_SIDE = 32
_MOST_LEVELS = 4  # by which the colour may be off: decoders round differently


def why_not(device: Literal["cpu", "gpu"] = "cpu") -> str:
    """Empty where DALI works on `device`, else the reason."""
    try:
        import nvidia.dali  # noqa: F401
    except ModuleNotFoundError as error:
        return f"DALI is not installed ({error}): {INSTALL}"
    except Exception as error:  # libraries that it needs
        return f"DALI cannot be imported: {gist(error)}"
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "torch finds no GPU for it to decode on"
    return trial(device, torch.cuda.current_device())


def trial(device: Literal["cpu", "gpu"], device_id: int | None) -> str:
    """Empty where DALI decodes an image of one colour as it should, else what it did instead."""
    graph = Graph((ViewSpec("images", (16, 16)),), 3, "bicubic", device=device)
    file = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), _COLOUR).save(file, "JPEG", quality=95)
    try:
        pipe = graph.build(1, 1, device_id)
        graph.feed(pipe, [graph.fed(file.getvalue(), [(Box(0, 0, _SIDE, _SIDE), False)])])
        output = pipe.outputs()[0]
        pixels = np.asarray((output.as_cpu() if device == "gpu" else output).as_tensor())[0].astype(int)
    except Exception as error:  # whatever a driver, a library or a decoder has to say
        return gist(error)
    distance = int(np.abs(pixels - np.array(_COLOUR)[:, None, None]).max())
    return "" if distance <= _MOST_LEVELS else f"an image of one colour came out with an error of {distance} levels"


def gist(error: BaseException) -> str:
    """What DALI says in the end, without the traceback of its own."""
    text = str(error).partition("encountered:")[2] or str(error)
    lines = [line.strip(" :") for line in text.splitlines()]
    return next((line for line in lines if line), type(error).__name__)[:200]
