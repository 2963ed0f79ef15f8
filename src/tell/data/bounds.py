"""Limits on what a compressed file may grow to, so that a small file cannot exhaust memory."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

from tell.errors import TellError

GROWTH = 100
"""Times its size that a file may grow to: text grows 3 to 20 times, a bomb 1,000 to 30,000 times."""
FLOOR = 128 * 2**20
"""Bytes that any file may grow to."""
CEILING = 4 * 2**30
"""Bytes that no file may exceed: rows are held in memory, at several times their size."""
_CHUNK = 2**20
_INPUT = 2**10  # zstandard makes up to 128 KiB of 4 bytes


class Allowance:
    """Counts the bytes that a compressed file has grown to."""

    def __init__(self, path: Path) -> None:
        self.path, self.used = path, 0
        self.size = path.stat().st_size
        self.limit = min(CEILING, max(FLOOR, GROWTH * self.size))

    def take(self, count: int) -> None:
        """Count ``count`` more bytes.

        Raises:
            TellError: that is more than the file may grow to.
        """
        self.used += count
        if self.used > self.limit:
            raise TellError(
                f"has {self.size:,} bytes and grows to more than {self.limit:,}",
                where=str(self.path),
                remedy="Split the file, or save it as plain JSON Lines.",
            )


def decompress(data: bytes, compression: str, path: Path) -> bytes:
    """The content of a .gz or .zst file.

    Raises:
        TellError: damaged, or larger than `Allowance` lets it grow.
    """
    allowance, parts = Allowance(path), []
    try:
        for part in _gzip(data) if compression == ".gz" else _zstandard(data):
            allowance.take(len(part))
            parts.append(part)
    except TellError:
        raise
    except Exception as error:  # zlib.error, EOFError, BadGzipFile, ZstdError: all mean the same to the user
        raise TellError(
            f"is not a complete {compression} file ({error})",
            where=str(path),
            remedy="Copy or compress it again.",
        ) from error
    return b"".join(parts)


def _gzip(data: bytes) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        while part := file.read(_CHUNK):
            yield part


def _zstandard(data: bytes) -> Iterator[bytes]:
    import zstandard

    # Frame by frame: zstandard's stream reader would take a file cut short for a whole one.
    view, start = memoryview(data), 0
    while start < len(data):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if start >= len(data):
                raise EOFError("it ends in the middle of a frame")
            yield frame.decompress(view[start : start + _INPUT])
            start += _INPUT
        start = min(start, len(data)) - len(frame.unused_data)
