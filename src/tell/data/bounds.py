"""Limits on what a compressed file may grow to, so that a small file cannot exhaust memory."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from tell.errors import TellError

GROWTH = 100
"""A file may grow to this many times its size: text grows 3 to 20 times, a bomb 1,000 to 30,000 times."""
FLOOR = 128 * 2**20
"""Bytes that every file may grow to."""
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
        """Count ``count`` more bytes; a TellError where the file may not grow so far."""
        self.used += count
        if self.used > self.limit:
            what = f"has {self.size:,} bytes and grows to more than {self.limit:,}"
            raise TellError(what, where=str(self.path), remedy="Split the file, or save it as plain JSON Lines.")


def decompress(data: bytes, compression: str, path: Path) -> bytes:
    """The content of a compressed file.

    Raises:
        TellError: damaged, or larger than `Allowance` lets it grow.
    """
    allowance, parts = Allowance(path), []
    try:
        for part in COMPRESSIONS[compression](data):
            allowance.take(len(part))
            parts.append(part)
    except TellError:
        raise
    except Exception as error:  # zlib.error, EOFError, BadGzipFile, ZstdError: all mean the same to the user
        what = f"is not a complete {compression} file ({error})"
        raise TellError(what, where=str(path), remedy="Copy or compress it again.") from error
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


COMPRESSIONS: dict[str, Callable[[bytes], Iterator[bytes]]] = {".gz": _gzip, ".zst": _zstandard}
"""What decompresses a file, by its last suffix."""
