"""Cells of a record as text, and errors of a row."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal

from tell.data.json_text import read_json
from tell.data.parquet import BadCell

_PLAIN = (bytes, datetime.date, datetime.time, Decimal, BadCell)


class RowFault(Exception):
    """A row cannot become an example; ``str()`` says why, the caller adds where."""

    def __init__(self, why: str, remedy: str = "Fill in that row, or remove it.") -> None:
        self.remedy = remedy
        super().__init__(why)


class Rejected(RowFault):
    """A row that its author marked as a bad example."""


def as_text(value: object) -> str:
    """A cell as text: empty for null and NaN, dates by ISO 8601, other values than strings as compact JSON.

    Raises:
        RowFault: the cell cannot be read, or is bytes that are not UTF-8, or infinite.
    """
    if type(value) is str:
        return value
    if value is None or (isinstance(value, float) and value != value):
        return ""
    plain = _plain(value) if isinstance(value, _PLAIN) else value
    if isinstance(plain, str):
        return plain
    try:
        return json.dumps(value, ensure_ascii=False, default=as_json, allow_nan=False)
    except ValueError as error:
        raise RowFault("contains a number that is not finite") from error
    except RecursionError as error:
        raise RowFault("is nested too deeply") from error


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def unpacked(value: object, fault: str, *, detail: bool = True) -> object:
    """A cell that may be JSON text (in CSV, or serialised) as its value; None for an empty text.

    Raises:
        RowFault: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return read_json(value) if value.strip() else None
    except ValueError as error:
        raise RowFault(f"{fault} ({error})" if detail else fault) from error


def as_json(value: object) -> object:
    """``default`` of ``json.dumps``: converts values that JSON has no type for."""
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    return _plain(value) if isinstance(value, _PLAIN) else str(value)


def _plain(value: bytes | datetime.date | datetime.time | Decimal | BadCell) -> str:
    if isinstance(value, BadCell):
        raise RowFault(f"has a cell that {value.why}")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise RowFault(f"contains bytes that are not UTF-8 (0x{value[error.start]:02x})") from error
    return format(value, "f") if isinstance(value, Decimal) else value.isoformat()
