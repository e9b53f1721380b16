"""A folder in which every image is odd in its own way: some are readable all the same, the others never are."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

READABLE = {"cmyk.jpg", "sixteen_bits.png", "palette_alpha.png", "grey.png", "rotated.jpg", "animated.png", "thin.png"}


def fill(folder: Path, photograph: Image.Image, damaged: dict[str, bytes]) -> set[str]:
    """Write them, with odd names and a loop of links. Returns the names of the readable ones, as printed."""
    folder.mkdir(parents=True, exist_ok=True)
    image = photograph.resize((96, 80))
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256).save(folder / "sixteen_bits.png")
    palette = image.quantize(64)
    palette.save(folder / "palette_alpha.png", transparency=3)
    image.convert("L").save(folder / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "rotated.jpg", exif=exif)
    image.save(folder / "animated.png", save_all=True, append_images=[Image.new("RGB", image.size, "red")])
    Image.new("RGB", (1, 300), "blue").save(folder / "thin.png")
    (folder / "sub").mkdir()
    image.save(folder / "sub" / "with space.jpg")
    with open(os.fsencode(folder) + b"/caf\xe9.jpg", "wb") as file:
        image.save(file, "JPEG")
    (folder / "sub" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "itself.jpg").symlink_to("itself.jpg")
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    return READABLE | {"with space.jpg", "caf\\xe9.jpg"}
