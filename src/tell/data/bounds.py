"""Limits on the decompressed size of a file, so that a small file cannot exhaust memory."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from tell.errors import TellError

GROWTH = 100
"""Most bytes after decompression, per byte of the file: text takes 3 to 20, a bomb 1,000 to 30,000."""
FLOOR = 128 * 2**20
"""Bytes that any file may decompress to."""
CEILING = 4 * 2**30
"""Most bytes of any file: rows are kept in memory, at several times their size."""
_CHUNK = 2**20
_INPUT = 2**10  # zstandard makes up to 128 KiB of 4 bytes


class Allowance:
    """Counts decompressed bytes of a file against the limit."""

    def __init__(self, path: Path) -> None:
        self.path, self.used = path, 0
        self.size = path.stat().st_size
        self.limit = min(CEILING, max(FLOOR, GROWTH * self.size))

    def take(self, count: int) -> None:
        """Count ``count`` more bytes; raises TellError above the limit."""
        self.used += count
        if self.used > self.limit:
            what = f"has {self.size:,} bytes and decompresses to more than {self.limit:,}"
            raise TellError(what, where=str(self.path), remedy="Split the file, or save it as plain JSON Lines.")


def decompress(data: bytes, compression: str, path: Path) -> bytes:
    """The decompressed content of a file.

    Raises:
        TellError: damaged, or larger than `Allowance` permits.
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

    # Frame by frame: zstandard's stream reader would accept a truncated file.
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
"""Decompressors by the last suffix of a file."""
