"""Rows of Parquet files and Arrow tables as plain Python values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tell.data.bounds import Allowance
from tell.data.json_text import read_json
from tell.errors import TellError

if TYPE_CHECKING:
    import pyarrow as pa

Fix = Callable[[Any], Any]
BATCH = 512  # rows; few, since each may be long


@dataclass(frozen=True, slots=True)
class BadCell:
    """A value that cannot be read; only rows that need it are refused."""

    why: str


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(row number from 1, record) of every row.

    Raises:
        TellError: not a Parquet file, a column named twice, or more data than `Allowance` permits.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            schema, allowance = file.schema_arrow, Allowance(path)
            twice = next((name for name, count in Counter(schema.names).items() if count > 1), None)
            if twice is not None:
                raise TellError(f"names the column {twice!r} twice", where=str(path), remedy="Rename one of them.")
            features = _features(schema)
            for batch in file.iter_batches(batch_size=BATCH):
                allowance.take(batch.nbytes)
                for record in batch_rows(batch, features):
                    number += 1
                    yield number, record
    except (pa.ArrowException, OSError) as error:
        raise TellError(
            f"is not a readable Parquet file ({str(error).splitlines()[0]})",
            where=f"{path}:{number + 1}" if number else str(path),
            remedy="Write it again.",
        ) from error


def _features(schema: pa.Schema) -> dict[str, object]:
    """The column types that Hugging Face datasets write into a file, class names among them."""
    try:
        return dict(read_json(schema.metadata[b"huggingface"].decode())["info"]["features"])
    except (TypeError, KeyError, ValueError):  # missing or of another form
        return {}


def batch_rows(batch: pa.RecordBatch, features: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """Rows of an Arrow batch: class names for numbers, 32-bit floats at their own precision, NaN as null.

    Args:
        features: column name to its type as Hugging Face datasets write it, ``{"_type": "ClassLabel", ...}``.
    """
    names = batch.schema.names
    fixes = [_fix_of(field.type, features.get(field.name)) for field in batch.schema]
    columns = [_values(array, fix) for array, fix in zip(batch.columns, fixes, strict=True)]
    for cells in zip(*columns, strict=True):
        yield dict(zip(names, cells, strict=True))


def _values(array: pa.Array, fix: Fix | None) -> list[object]:
    try:
        values = array.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond the year 9999
        values = [_value(cell) for cell in array]
    return [None if v is None else v if isinstance(v, BadCell) else fix(v) for v in values] if fix else values


def _value(cell: pa.Scalar) -> object:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return BadCell(f"is not UTF-8 (byte 0x{error.object[error.start]:02x})")
    except (ValueError, OverflowError) as error:
        return BadCell(f"cannot be read ({error})")


def _fix_of(kind: pa.DataType, feature: object) -> Fix | None:
    """A converter of a column's values into plain ones; None where they are plain already."""
    import pyarrow as pa

    about = feature if isinstance(feature, dict) else {}
    names = about.get("names")
    if about.get("_type") == "ClassLabel" and isinstance(names, list) and pa.types.is_integer(kind):
        return lambda v: str(names[v]) if 0 <= v < len(names) else None
    if pa.types.is_floating(kind):
        return _shortest(kind.bit_width)
    if pa.types.is_map(kind):
        return dict
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = feature[0] if isinstance(feature, list) and feature else about.get("feature")
        each = _fix_of(kind.value_type, inner)
        return each and (lambda v: [None if item is None else each(item) for item in v])
    if pa.types.is_struct(kind):
        fixes = {field.name: fix for field in kind if (fix := _fix_of(field.type, about.get(field.name)))}
        if fixes:
            return lambda v: {k: fixes[k](x) if k in fixes and x is not None else x for k, x in v.items()}
    return None


def _shortest(bits: int) -> Fix:
    """Turns a float into the shortest decimal that reads back equal, 0.1 and not 0.10000000149011612; NaN into null."""
    import numpy as np

    kind = {16: np.float16, 32: np.float32, 64: float}[bits]
    return lambda value: None if value != value else float(str(kind(value)))
