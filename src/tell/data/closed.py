"""Closed fields: parts of an answer with few possible values, which are decided among them instead of sampled."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from tell.data.example import Example
from tell.data.json_text import nfc, parse_strict
from tell.data.kind import Kind
from tell.data.label_text import FORMS, as_label, is_short
from tell.data.schema import Schema

MOST_VALUES = 1000  # an enumeration of more values is a dictionary, not a choice
NEW = 0.5
"""Values that only the rows know are a closed field's if the next one is new with at most this chance: by Good and
Turing, the share of values seen once."""
COPIED = 0.5  # share of such values that stand in their prompts, above which they are taken from there
LEAST_NEW = 0.01  # however often all values were seen
FieldKind = Literal["value", "empty", "items"]
EMPTY = "[]"
ITEM = "[]"
"""The step of a path that leads to an item of a list."""


@dataclass(frozen=True)
class ClosedField:
    """A field and its possible values.

    Attributes:
        path: keys from the top of the answer; empty: the whole answer, a label or a list of labels, or the object
            itself.
        kind: ``value``: one of ``values``; ``empty``: whether a list is empty; ``items``: which items a list has.
        values: as they stand in an answer: JSON, or the label.
        open: further values are possible; what they have in common is that they are none of ``values``.
        new: of an open set, the chance that the next value is a further one (Good and Turing).
        separator: between the labels of a list that is no JSON, as of `tell.data.label_text.ListForm`.
    """

    path: tuple[str, ...]
    kind: FieldKind
    values: tuple[str, ...]
    open: bool = False
    new: float = 1.0
    separator: str = ""

    @property
    def name(self) -> str:
        """As in reports: ``category``, ``intents[]``, ``products empty``; ``label`` or ``labels[]`` for an answer."""
        whole = "labels" if self.is_set else "label"
        return (".".join(self.path) or whole) + {"value": "", "empty": " empty", "items": ITEM}[self.kind]

    @property
    def classes(self) -> int:
        """Number of values, further ones counted as one; those of a set do not count."""
        return len(self.values) + (self.open and not self.is_set)

    @property
    def is_set(self) -> bool:
        """Whether several values may hold at once."""
        return self.kind == "items"

    @property
    def in_json(self) -> bool:
        """Whether values are JSON, not labels as they are."""
        return bool(self.path) or (self.is_set and not self.separator)

    def target(self, answer: str) -> np.ndarray | None:
        """(classes,) 1 for the values of an answer, else 0; None where the answer lacks the field."""
        if not self.in_json:
            found = [as_label(part) for part in (answer.split(self.separator.strip()) if self.is_set else [answer])]
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
        if self.in_json:
            found = parse_strict(value) if value else None
            value = found if isinstance(found, str) else ""
        return value.replace("_", " ").strip()

    @property
    def words(self) -> dict[int, str]:
        """The words of each value that has some, by its class."""
        return {c: text for c in range(len(self.values)) if (text := self.described(c))}

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": list(self.path),
            "kind": self.kind,
            "values": list(self.values),
            "open": self.open,
            "new": self.new,
            **({"separator": self.separator} if self.separator else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ClosedField:
        """From what `to_dict` returns; other keys are ignored. A ValueError, TypeError or KeyError where it is not."""
        path, kind, values = tuple(data["path"]), data["kind"], tuple(data["values"])
        if kind not in get_args(FieldKind) or not all(isinstance(text, str) for text in (*path, *values)):
            raise ValueError(f"{path}: {kind}, {values}")
        separator = data.get("separator", "")
        if separator not in {form.separator for form in FORMS.values()} or (separator and (path or kind != "items")):
            raise ValueError(f"{path}: {kind}, separated by {separator!r}")
        return cls(path, kind, values, bool(data["open"]), float(data["new"]), separator)


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


def closed_fields(kind: Kind, examples: Sequence[Example]) -> list[ClosedField]:
    """The closed fields of a task: its label or labels, what its schema enumerates, and what its answers repeat.

    Of a JSON answer these are properties that enumerate, are booleans or may be null; lists that may be empty, or whose
    items repeat; and strings that repeat. Strings that most prompts contain are copied from there, and are not closed.
    Fields that are alike in all training answers are left out: nothing is to be decided.

    Args:
        kind: as from `tell.data.kind.detect_kind`.
        examples: the training rows.
    """
    answers = [example.answer for example in examples]
    fields: dict[tuple[str, ...], ClosedField] = {}
    if kind.list_form is not None and kind.labels:
        form = kind.list_form
        values = kind.labels if form.separator else tuple(map(as_json, kind.labels))
        fields[()] = ClosedField((), "items", values, separator=form.separator)
    elif kind.labels:
        fields[()] = ClosedField((), "value", kind.labels)
    elif kind.name == "json" and kind.schema is not None:
        checked = Schema(nfc(kind.shown or kind.schema))  # test rows must not widen what an answer may be
        found = [*_within(checked, checked.schema, (), frozenset()), *_repeated(examples)]
        for one in found:  # a list whose items are known needs no decision whether it is empty
            if one.path not in fields or (fields[one.path].kind == "empty" and one.is_set):
                fields[one.path] = one
    return [one for one in fields.values() if _varies(one, answers)]


_FIRST_KEY = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:')


def opening(kind: Kind, answers: Sequence[str]) -> str:
    """What all training answers of a JSON task begin with, up to the first value: ``{"category":``; else empty.

    A model that is led past it cannot answer in prose.
    """
    first = _FIRST_KEY.match(answers[0]) if kind.name == "json" and answers else None
    if first is None or not all(answer.startswith(first.group()) for answer in answers):
        return ""
    return first.group()


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


def _repeated(examples: Sequence[Example]) -> Iterator[ClosedField]:
    """Fields whose values only the answers know: strings that repeat, and lists of such."""
    found: dict[tuple[tuple[str, ...], bool], _Strings] = defaultdict(_Strings)
    mixed: set[tuple[str, ...]] = set()  # paths with values of other types

    def visit(value: object, path: tuple[str, ...], prompt: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                visit(part, (*path, key), prompt)
        elif isinstance(value, str):
            found[path, False].add(value, prompt)
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            for item in value:
                found[path, True].add(item, prompt)
        else:
            mixed.add(path)

    for example in examples:
        if isinstance(value := value_at(example.answer, ()), dict):
            visit(value, (), "\n".join(turn.content for turn in example.prompt).casefold())
    for (path, is_list), strings in found.items():
        if path not in mixed and (path, not is_list) not in found and strings.closed:
            values = tuple(map(as_json, sorted(strings.counts)))
            kind: FieldKind = "items" if is_list else "value"
            yield ClosedField(path, kind, values, True, max(LEAST_NEW, strings.new) if is_list else 1.0)


@dataclass
class _Strings:
    """Strings of one field: how often each occurs, and how many stand in their prompt."""

    counts: Counter[str] = field(default_factory=Counter)
    copied: int = 0

    def add(self, text: str, prompt: str) -> None:
        self.counts[text] += 1
        self.copied += text.casefold() in prompt

    @property
    def new(self) -> float:
        """The chance that the next value is a new one, by Good and Turing: the share of values seen once."""
        return sum(count == 1 for count in self.counts.values()) / self.counts.total()

    @property
    def closed(self) -> bool:
        """Whether they are short, mostly not copied, and a new one is no more likely than a known one."""
        few = self.new <= NEW and self.copied <= COPIED * self.counts.total()
        return few and all(map(is_short, self.counts))
