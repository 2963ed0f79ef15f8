"""Closed fields: parts of an answer with few possible values, which are decided among them instead of sampled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tell.data.json_text import nfc, parse_strict
from tell.data.kind import Kind, as_label, is_short
from tell.data.schema import Schema

MOST_VALUES = 1000  # an enumeration of more values is a dictionary, not a choice
NEW = 0.5
"""Values that only the rows know are a closed field's if the next one is new with at most this chance: by Good and
Turing, the share of values seen once."""
LEAST_NEW = 0.01  # however often all values were seen
FieldKind = Literal["value", "empty", "items"]
EMPTY = "[]"
ITEM = "[]"
"""The step of a path that leads to an item of a list."""


@dataclass(frozen=True)
class ClosedField:
    """A field and its possible values.

    Attributes:
        path: keys from the top of the answer; empty: the whole answer, a label, or the object itself.
        kind: ``value``: one of ``values``; ``empty``: whether a list is empty; ``items``: which items a list has.
        values: as they stand in an answer: JSON, or the label.
        open: further values are possible; what they have in common is that they are none of ``values``.
        new: of an open set, the chance that the next value is a further one (Good and Turing).
    """

    path: tuple[str, ...]
    kind: FieldKind
    values: tuple[str, ...]
    open: bool = False
    new: float = 1.0

    @property
    def name(self) -> str:
        """As in reports: ``category``, ``intents[]``, ``products empty``; ``label`` for the whole answer."""
        return (".".join(self.path) or "label") + {"value": "", "empty": " empty", "items": ITEM}[self.kind]

    @property
    def classes(self) -> int:
        """Number of values, further ones counted as one; those of a set do not count."""
        return len(self.values) + (self.open and not self.is_set)

    @property
    def is_set(self) -> bool:
        """Whether several values may hold at once."""
        return self.kind == "items"

    def target(self, answer: str) -> np.ndarray | None:
        """(classes,) 1 for the values of an answer, else 0; None where the answer lacks the field."""
        if not self.path:
            found: list[str] = [as_label(answer)]
        else:
            value = value_at(answer, self.path)
            if value is MISSING:
                return None
            if self.is_set:
                if not isinstance(value, list):
                    return None
                found = [as_json(part) for part in value]
            else:
                found = [as_json(value)]
        known = {text: i for i, text in enumerate(self.values)}
        hits = [known[text] for text in found if text in known]
        if not hits and not self.is_set:
            if not self.open:
                return None
            hits = [len(self.values)]
        out = np.zeros(self.classes)
        out[hits] = 1
        return out

    def described(self, index: int) -> str:
        """The words of a value, for a text that names it; empty where it has none."""
        value = self.values[index] if index < len(self.values) else ""
        if self.path:
            found = parse_strict(value) if value else None
            value = found if isinstance(found, str) else ""
        return value.replace("_", " ").strip()

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": list(self.path),
            "kind": self.kind,
            "values": list(self.values),
            "open": self.open,
            "new": self.new,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ClosedField:
        """From what `to_dict` returns; other keys are ignored. A ValueError, TypeError or KeyError where it is not."""
        path, kind, values = tuple(data["path"]), data["kind"], tuple(data["values"])
        if kind not in get_args(FieldKind) or not all(isinstance(text, str) for text in (*path, *values)):
            raise ValueError(f"{path}: {kind}, {values}")
        return cls(path, kind, values, bool(data["open"]), float(data["new"]))


MISSING = object()


def value_at(answer: str, path: Sequence[str]) -> object:
    """The value at a path of keys in a JSON answer; `MISSING` where there is none."""
    try:
        value: object = nfc(parse_strict(answer))
    except ValueError:
        return MISSING
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return MISSING
        value = value[key]
    return value


def as_json(value: object) -> str:
    """A value as answers spell it."""
    return json.dumps(value, ensure_ascii=False)


def closed_fields(kind: Kind, answers: Sequence[str]) -> list[ClosedField]:
    """The closed fields of a task: its label, what its schema enumerates, and what its answers repeat.

    Of a JSON answer these are properties that enumerate, are booleans or may be null; lists that may be empty, or whose
    items repeat; and strings that repeat. Those that are alike in all training answers are left out: nothing is to be
    decided.

    Args:
        kind: as from `tell.data.kind.detect_kind`.
        answers: of the training rows.
    """
    fields: dict[tuple[str, ...], ClosedField] = {}
    if kind.name == "label" and kind.labels:
        fields[()] = ClosedField((), "value", kind.labels)
    elif kind.name == "json" and kind.schema is not None:
        checked = Schema(nfc(kind.schema))
        found = [*_within(checked, checked.schema, (), frozenset()), *_repeated(answers)]
        for field in found:  # a list whose items are known needs no decision whether it is empty
            if field.path not in fields or (fields[field.path].kind == "empty" and field.is_set):
                fields[field.path] = field
    return [field for field in fields.values() if field.classes <= MOST_VALUES and _varies(field, answers)]


def _varies(field: ClosedField, answers: Sequence[str]) -> bool:
    return len({tuple(found) for answer in answers if (found := field.target(answer)) is not None}) > 1


def _within(checked: Schema, node: object, path: tuple[str, ...], above: frozenset[int]) -> Iterator[ClosedField]:
    """The closed fields at and below ``node``; a recursive schema is followed once."""
    named: dict[str, list[object]] = {}
    for key, part in checked.properties(node):
        if id(part) not in above:
            named.setdefault(key, []).append(part)
    for key, parts in named.items():
        if (field := _field(checked, parts, (*path, key))) is not None:
            yield field
        for part in parts:
            yield from _within(checked, part, (*path, key), above | {id(part)})


def _field(checked: Schema, nodes: Sequence[object], path: tuple[str, ...]) -> ClosedField | None:
    """The closed field that some subschemas of one property describe; None where no value is known beforehand."""
    values: dict[str, None] = {}
    items: dict[str, None] = {}
    further = is_list = further_items = False
    for part in (part for node in nodes for part in checked.parts(node)):
        kinds = part.get("type", ())
        kinds = {kinds} if isinstance(kinds, str) else set(kinds)
        if (named := _enumerated(part)) is not None:
            values |= dict.fromkeys(named)
            continue
        values |= {"true": None, "false": None} if "boolean" in kinds else {}
        values |= {"null": None} if "null" in kinds else {}
        if "array" in kinds:
            is_list = True
            for item in checked.parts(part.get("items")):
                items |= dict.fromkeys(_enumerated(item) or ())
                further_items |= "type" in item and _enumerated(item) is None
        further |= bool(kinds - {"null", "boolean", "array"})
    if is_list and not further and not values:
        if not items:
            return ClosedField(path, "empty", (EMPTY,), True)
        return ClosedField(path, "items", tuple(items), further_items)
    return ClosedField(path, "value", tuple(values), further or is_list) if values else None


def _enumerated(node: dict) -> list[str] | None:
    """The values that a subschema names, as JSON; None where it names none."""
    if isinstance(node.get("enum"), list):
        return [as_json(value) for value in node["enum"]]
    return [as_json(node["const"])] if "const" in node else None


def _repeated(answers: Sequence[str]) -> Iterator[ClosedField]:
    """Fields whose values only the answers know: strings and items that repeat."""
    strings: dict[tuple[str, ...], Counter[str]] = {}
    items: dict[tuple[str, ...], Counter[str]] = {}
    mixed: set[tuple[str, ...]] = set()

    def visit(value: object, path: tuple[str, ...]) -> None:
        if isinstance(value, str):
            strings.setdefault(path, Counter())[value] += 1
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            items.setdefault(path, Counter()).update(value)
        elif isinstance(value, dict):
            for key, part in value.items():
                visit(part, (*path, key))
        else:
            mixed.add(path)

    for answer in answers:
        if isinstance(value := value_at(answer, ()), dict):
            visit(value, ())
    for path, found in strings.items():
        if path not in mixed and _is_closed(found):
            yield ClosedField(path, "value", tuple(map(as_json, sorted(found))), True)
    for path, found in items.items():
        if path not in mixed and _is_closed(found):
            yield ClosedField(path, "items", tuple(map(as_json, sorted(found))), True, max(LEAST_NEW, _new(found)))


def _is_closed(counts: Counter[str]) -> bool:
    """Whether strings are short and a new one is no more likely than a known one."""
    return bool(counts) and _new(counts) <= NEW and all(map(is_short, counts))


def _new(counts: Counter[str]) -> float:
    """The chance that the next value is a new one, by Good and Turing: the share of values seen once."""
    return sum(count == 1 for count in counts.values()) / counts.total()
