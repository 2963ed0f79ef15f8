"""Whether a JSON text that is still being written can come to follow a schema."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic_core import from_json

from tell.data.json_text import parse_strict
from tell.data.schema import Schema
from tell.shown import brief

NOT_JSON = "not JSON"
_FINAL = {"type", "additionalProperties", "propertyNames", "maxItems", "maxProperties"}
"""Keywords that an object or list which breaks them breaks for good, however it goes on."""
_UNDECIDED = {"then", "else", "dependentSchemas"}  # they may apply no more when the object is complete
_BRACKETS = frozenset("{}[]")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)


def schema_faults(schema: Schema, text: str, *, whole: bool = True) -> Iterator[str]:
    """Where a text does not follow a schema.

    Args:
        whole: False: more text may follow, and only what that cannot mend is a fault. Keys may come in any order.

    Raises:
        SlowPattern: a pattern of the schema takes too long.
    """
    bare = _STRING.sub("", text)
    depth = sum((char in "{[") - (char in "}]") for char in bare)
    whole = whole or (depth <= 0 and not _BRACKETS.isdisjoint(bare))
    try:  # in a list any value may be cut short, and none may follow
        found = [parse_strict(text)] if whole else from_json(f"[{text}", allow_partial=True, allow_inf_nan=False)
    except (ValueError, RecursionError):
        found = [None, None]
    if len(found) != 1:
        yield from [NOT_JSON] if found else []
        return
    still = set() if whole else _open(found[0], depth + bare[-1:].isdigit())
    for error in schema.validator.iter_errors(found[0]):
        grows = tuple(error.absolute_path) in still and error.validator not in _FINAL
        if whole or not (grows or _UNDECIDED & set(error.absolute_schema_path)):
            yield brief(f"{error.json_path}: {error.message}", 160)


def _open(value: object, count: int) -> set[tuple[str | int, ...]]:
    """Paths of what more text may add to: the first on the path to the last value, as many as the text left open."""
    path: tuple[str | int, ...] = ()
    found = {path} if count > 0 else set()
    while len(found) < count and isinstance(value, dict | list) and value:
        key, value = list(value.items())[-1] if isinstance(value, dict) else (len(value) - 1, value[-1])
        found.add(path := (*path, key))
    return found
