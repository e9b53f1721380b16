"""Bytes at given places of a shard."""

import os
import stat

_WINDOW = 4096  # read at a time where headers are looked for: a header and the small members after it


class ShardError(ValueError):
    """From byte `offset` on, a shard is not what it should be."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"{reason} at byte {offset:,}")
        self.offset, self.reason = offset, reason


class ShardFile:
    """An open file. Reading moves no position, so threads and forked processes may share it.

    Raises:
        OSError: it cannot be opened.
        ShardError: it is no regular file.
    """

    def __init__(self, path: bytes) -> None:
        self._file = -1
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not stop us
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise ShardError(0, "no regular file")
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
        self._window, self._start = b"", 0

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes.

        Raises:
            ShardError: the file ends before.
        """
        if offset + count > self.size:
            raise ShardError(offset, f"cut off: {count:,} bytes wanted, {max(0, self.size - offset):,} left")
        parts = []
        at, end = offset, offset + count
        while at < end:
            part = os.pread(self._file, min(end - at, 1 << 30), at)
            if not part:
                raise ShardError(offset, f"cut off: {count:,} bytes wanted, {at - offset:,} left")
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def at(self, offset: int, count: int) -> bytes:
        """As `read`, for many short reads close to each other, by one thread."""
        first = offset - self._start
        if first < 0 or first + count > len(self._window):
            if count > _WINDOW:
                return self.read(offset, count)
            self._window = self.read(offset, max(count, min(_WINDOW, self.size - offset)))
            self._start, first = offset, 0
        return self._window[first : first + count]
