"""What sections of a configuration are made from: their base, limits, how values are spelled. Imports no torch."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence

from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator

LARGEST = 10**7  # limit of counts that memory or time grows with: a larger one is a typo
_UNWRITABLE = re.compile("[\\0\ud800-\udfff]")  # Python decodes argument bytes that are not UTF-8 to surrogates


class Conflict(ValueError):
    """Mutually exclusive keys of a section are set."""

    def __init__(self, problem: str, keys: Sequence[str]) -> None:
        super().__init__(problem)
        self.keys = keys


class Section(BaseModel):
    """Keys of a configuration; unknown ones, infinite numbers and text that cannot be saved are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, populate_by_name=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _writable(cls, value: object) -> object:
        """Refuse text that can be neither saved nor a file name."""
        if isinstance(value, str) and _UNWRITABLE.search(value):
            raise ValueError("contains a character that is not UTF-8, or NUL")
        return value


def _spelled(value: object) -> object:
    return "off" if value is False else value


SpelledOff = BeforeValidator(_spelled)  # YAML reads a bare off as false


def _number_or_auto(value: object) -> object:
    """``auto`` is None, ``off`` is 0; YAML reads a bare off as false."""
    return {"auto": None, "off": 0}.get(value, value) if isinstance(value, str) else 0 if value is False else value


OrAuto = BeforeValidator(_number_or_auto)


def _names(value: object) -> object:
    """Comma-separated names; one that has a comma itself is written in double quotes."""
    if not isinstance(value, str):
        return value
    rows = list(csv.reader([value], skipinitialspace=True))
    return tuple(dict.fromkeys(name.strip() for name in (rows[0] if rows else ()) if name.strip()))


Names = BeforeValidator(_names)
