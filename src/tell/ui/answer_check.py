"""Whether an answer has the form that a run's answers have, and whether one that is being written still can have it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from pydantic_core import from_json

from tell.data.json_text import parse_strict
from tell.data.schema import Schema, SlowPattern
from tell.errors import TellError
from tell.files import read_json
from tell.folder import RunFolder
from tell.report.read_run import rows_of
from tell.shown import brief

FINAL = {"type", "additionalProperties", "propertyNames", "maxItems", "maxProperties"}
"""Keywords that an object or list which breaks them breaks for good, however it goes on."""
UNDECIDED = {"then", "else", "dependentSchemas"}
_BRACKETS = frozenset("{}[]")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|$)', re.DOTALL)


@dataclass(frozen=True)
class Check:
    """The form of answers.

    Attributes:
        schema: None: none is known.
        labels: the possible answers; empty: not known.
    """

    schema: Schema | None = None
    labels: frozenset[str] = frozenset()

    @classmethod
    def of(cls, folder: RunFolder) -> Check:
        """From the files of the run; damaged ones check nothing."""
        schema, labels = None, frozenset[str]()
        with suppress(OSError, TellError):
            labels = frozenset(map(str, rows_of(read_json(folder.findings, remedy=""), "kind", "labels")))
        with suppress(OSError, TellError):
            schema = Schema(read_json(folder.schema, remedy=""))
        return cls(schema, labels)

    def __call__(self, text: str, *, whole: bool = True) -> tuple[bool, str] | None:
        """Whether it has that form, and in words; None where nothing is known of it.

        Args:
            whole: False: more may follow, and it is asked whether an answer that begins so can have that form.
        """
        if self.schema is not None:
            with suppress(SlowPattern):
                fault = next(self._faults(text, whole), "")
                return not fault, fault or ("follows the schema" if whole else "follows the schema so far")
        elif self.labels:
            begun, own = text.strip(), self.labels
            known = begun in own if whole else any(label.startswith(begun) for label in own)
            return known, "a label of the task" if known else "no label of the task"
        return None

    def _faults(self, text: str, whole: bool) -> Iterator[str]:
        assert self.schema is not None
        bare = _STRING.sub("", text)
        depth = sum((char in "{[") - (char in "}]") for char in bare)
        whole = whole or (depth <= 0 and not _BRACKETS.isdisjoint(bare))
        try:  # in a list any value may be cut short, and none may follow
            found = [parse_strict(text)] if whole else from_json(f"[{text}", allow_partial=True, allow_inf_nan=False)
        except (ValueError, RecursionError):
            found = [None, None]
        if len(found) != 1:
            yield from ["not JSON"] if found else []
            return
        still = set() if whole else _open(found[0], depth + bare[-1:].isdigit())
        for error in self.schema.validator.iter_errors(found[0]):
            grows = tuple(error.absolute_path) in still and error.validator not in FINAL
            if whole or not (grows or UNDECIDED & set(error.absolute_schema_path)):
                yield brief(f"{error.json_path}: {error.message}", 160)


def _open(value: object, count: int) -> set[tuple[str | int, ...]]:
    """Paths of what more text may add to: the first on the path to the last value, as many as the text left open."""
    path: tuple[str | int, ...] = ()
    found = {path} if count > 0 else set()
    while len(found) < count and isinstance(value, dict | list) and value:
        key, value = list(value.items())[-1] if isinstance(value, dict) else (len(value) - 1, value[-1])
        found.add(path := (*path, key))
    return found
