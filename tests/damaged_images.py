"""Damaged and hostile files, made on the spot."""

import io
import struct
import zlib

import pytest
from PIL import Image


def bomb_png(width: int, height: int) -> bytes:
    """A small PNG that claims, and would decode to, `width` x `height` pixels of one bit."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="session")
def damaged(photographs: dict[str, Image.Image]) -> dict[str, bytes]:
    """File name -> contents that no reader accepts."""
    image = photographs["china"].resize((160, 120))
    encoded = {}
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        encoded[kind] = buffer.getvalue()
    gif = io.BytesIO()
    image.save(gif, "GIF")
    return {
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "truncated.jpg": encoded["JPEG"][: len(encoded["JPEG"]) // 2],
        "truncated.png": encoded["PNG"][: len(encoded["PNG"]) // 2],
        "bomb.png": bomb_png(20_000, 20_000),  # Pillow itself refuses: DecompressionBombError, no OSError
        "quiet_bomb.png": bomb_png(12_000, 12_000),  # Pillow itself only warns
        "gif.jpg": gif.getvalue(),  # a good image of a format that we do not open
    }
