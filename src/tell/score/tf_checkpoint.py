"""Variables of a TensorFlow checkpoint, read without TensorFlow.

A checkpoint is an index, ``variables.index``, and shards of raw numbers beside it. The index is a LevelDB table from
a variable's name to a BundleEntryProto (tensorflow/core/protobuf/tensor_bundle.proto), which TensorFlow writes
uncompressed (tensorflow/core/util/tensor_bundle).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tell.errors import TellError

_MAGIC = 0xDB4775248B80FB57  # ends every LevelDB table
_FOOTER = 48  # bytes: two block handles, padded, and the magic number
_TRAILER = 5  # bytes behind a block: kind of compression and checksum
_FLOAT = 1  # DT_FLOAT of tensorflow/core/framework/types.proto


def read_variables(prefix: str | Path) -> dict[str, np.ndarray]:
    """All fp32 variables by name, as copies; others (a step counter, say) are passed over.

    Args:
        prefix: path without ``.index``, e.g. ``BLEURT-20/variables/variables``.

    Raises:
        TellError: a file is missing, cut short or of another format, or a variable is stored in slices.
    """
    path = Path(f"{prefix}.index")
    try:
        entries = dict(_table(path.read_bytes()))
        header = dict(_fields(entries.pop(b"")))
        shards = int(header.get(1, 1))
        data = [np.memmap(f"{prefix}.data-{i:05d}-of-{shards:05d}", np.uint8, "r") for i in range(shards)]
        return {
            name.decode(): values
            for name, entry in entries.items()
            if (values := _values(name, entry, data)) is not None
        }
    except FileNotFoundError as error:
        raise TellError(
            "no such file", where=str(error.filename), remedy="Unpack the whole checkpoint, variables included."
        ) from error
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise TellError(
            f"is no whole TensorFlow checkpoint ({error})", where=str(path), remedy="Download it again."
        ) from error


def _values(name: bytes, entry: bytes, data: list[np.memmap]) -> np.ndarray | None:
    """The numbers of a BundleEntryProto, in its shape; None for another type than fp32."""
    shape: list[int] = []
    facts: dict[int, int] = {}
    for number, value in _fields(entry):
        if number == 2:
            shape = [int(dict(_fields(dim)).get(1, 0)) for field, dim in _fields(value) if field == 2]
        elif number == 7:
            raise ValueError(f"{name.decode()} is stored in slices")
        else:
            facts[number] = value
    if facts.get(1) != _FLOAT:
        return None
    offset, size = facts.get(4, 0), facts.get(5, 0)
    raw = data[facts.get(3, 0)][offset : offset + size]
    if raw.nbytes != size or size != 4 * int(np.prod(shape)):
        raise ValueError(f"{name.decode()} has {raw.nbytes} bytes for shape {tuple(shape)}")
    return np.frombuffer(raw.tobytes(), dtype="<f4").reshape(shape).copy()


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of a LevelDB table in the order of keys."""
    if len(data) < _FOOTER or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise ValueError("its end is missing")
    _, _, at = _handle(data, len(data) - _FOOTER)  # of the block of metadata, which is empty
    offset, size, _ = _handle(data, at)
    for _, handle in _block(data, offset, size):
        offset, size, _ = _handle(handle, 0)
        yield from _block(data, offset, size)


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    """Offset and size of a block, and the place behind its handle."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return offset, size, at


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of one block; keys are stored without what they share with the key before."""
    if offset + size + _TRAILER > len(data):
        raise ValueError("it is cut short")
    if data[offset + size]:
        raise ValueError("it is compressed")
    block = data[offset : offset + size]
    restarts = struct.unpack("<I", block[-4:])[0]
    end, at, key = size - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + length]
        at += length


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a protocol buffer."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
        elif kind == 2:
            length, at = _varint(message, at)
            yield tag >> 3, message[at : at + length]
            at += length
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            yield tag >> 3, int.from_bytes(message[at : at + width], "little")
            at += width
        else:
            raise ValueError(f"a field of kind {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in base 128 and the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
