"""CRC-32C, the checksum of TFRecord files, fast enough without a library of its own.

The checksum of a message is linear in its bits: each byte adds a number that depends on the byte and on how far it is
from the end. So numpy looks up all bytes of a message at once, in blocks of 256 bytes, and only blocks are joined one
by one: 100 kB take a fraction of what decoding them takes.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
_BLOCK = 256
_MASK_DELTA = 0xA282EAD8


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`."""
    if len(data) < 2 * _BLOCK:
        return _extended(0xFFFFFFFF, data) ^ 0xFFFFFFFF
    head = len(data) % _BLOCK
    state = _extended(0xFFFFFFFF, data[:head])
    blocks = np.frombuffer(data, dtype=np.uint8, offset=head).reshape(-1, _BLOCK)
    places, skip = _places(), _skip()
    for start in range(0, len(blocks), 4096):  # 4 MiB of look-ups at a time
        found = places[np.arange(_BLOCK), blocks[start : start + 4096]]
        for part in np.bitwise_xor.reduce(found, axis=1).tolist():
            state = skip[0][state & 255] ^ skip[1][state >> 8 & 255] ^ skip[2][state >> 16 & 255] ^ skip[3][state >> 24]
            state ^= part
    return state ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """As TFRecord files store it, so that a checksum of data that holds checksums stays useful."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _extended(state: int, data: bytes) -> int:
    table = _table()
    for byte in data:
        state = table[(state ^ byte) & 255] ^ state >> 8
    return state


@cache
def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


@cache
def _places() -> NDArray[np.uint32]:
    """[256, 256]: what a byte value adds at each place of a block."""
    table = np.array(_table(), dtype=np.uint32)
    places = np.empty((_BLOCK, 256), dtype=np.uint32)
    places[-1] = table
    for place in range(_BLOCK - 2, -1, -1):
        after = places[place + 1]
        places[place] = table[after & 255] ^ after >> np.uint32(8)
    return places


@cache
def _skip() -> list[list[int]]:
    """[4][256]: what each byte of the state becomes by a block of zeros."""
    # The state is added to the first four bytes that follow it, so it passes like those bytes do.
    return _places()[:4].tolist()
