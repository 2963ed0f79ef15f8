"""What a constrained answer may be: JSON by a schema, its keys and white space as in the references, or a label.

A grammar (`tell.decode.grammar`) is compiled from it. No torch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tell.arm import CONSTRAINTS, Constrain
from tell.data.example import Example
from tell.data.json_text import parse_strict
from tell.data.kind import Kind
from tell.data.schema import Schema
from tell.errors import TellError
from tell.shown import brief

WhiteSpace = Literal["compact", "spaced", "either", "free"]
"""White space of JSON: none; one space after commas and colons, as ``json.dumps`` writes; none or one; any."""
OFF = "leave out generate.constrain and the arms ending in +schema"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\u")


class Constraint(BaseModel):
    """What an answer may be; kept as ``constraint.json`` of a run.

    Attributes:
        json_schema: JSON Schema (``schema`` in the file) whose properties have the order of answers; None for labels.
        white_space: of JSON.
        escapes: JSON strings may have escapes of printable characters (``\\u00e9``).
        labels: the possible answers, where there is no schema.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    white_space: WhiteSpace = "either"
    escapes: bool = False
    labels: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one(self) -> Constraint:
        if (self.json_schema is None) == (not self.labels):
            raise ValueError("either a schema or labels are needed")
        return self

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, mode="json")

    @classmethod
    def of_schema(cls, schema: object) -> Constraint:
        """The constraint of a schema alone, in either white space: a request's, without references.

        Raises:
            TellError: it is not a JSON Schema, refers to another place, or loops.
        """
        if not isinstance(schema, dict):
            raise TellError(f"the schema is {brief(schema)}, not a JSON object", remedy="Give a JSON Schema.")
        return cls.model_validate({"schema": Schema(schema).schema})

    @classmethod
    def of(cls, kind: Kind, examples: Sequence[Example]) -> tuple[Constraint, list[str]] | None:
        """The constraint of a task, and notices about it; None for free text.

        Args:
            examples: rows whose answers the keys' order and the white space are taken from: training rows.

        Raises:
            TellError: two answers have the same keys in different orders.
        """
        if kind.name == "label" and kind.labels:
            return cls(labels=kind.labels), []
        schema = kind.shown or kind.schema  # test rows must not widen what an answer may be
        if kind.name != "json" or schema is None:
            return None
        schema, notices = in_their_order(schema, examples)
        texts = [example.answer for example in examples]
        space = white_space(texts)
        if space == "free":
            notices.append("constrained answers may have any white space, as the references do: it is not forced")
        made = {"schema": schema, "white_space": space, "escapes": any(map(_ESCAPE.search, texts))}
        return cls.model_validate(made), notices


def check_choice(choice: Constrain, kind: str) -> None:
    """Refuse a value of ``generate.constrain`` that is not for tasks of that kind.

    Raises:
        TellError: it is for another kind of task.
    """
    fits = CONSTRAINTS.get(kind)
    if choice not in ("off", fits):
        remedy = f"Use generate.constrain={fits}." if fits else "Use generate.constrain=off."
        raise TellError(f"{choice} does not fit a task of kind {kind}", where="generate.constrain", remedy=remedy)


def white_space(answers: Iterable[str]) -> WhiteSpace:
    """The white space that all JSON answers have; ``spaced`` where they have nothing to separate."""
    possible = {"compact", "spaced"}
    for answer in answers:
        bare = _STRING.sub('""', answer.strip())
        marks = bare.count(",") + bare.count(":")
        spaced = bare.count(", ") + bare.count(": ")
        blanks = len(re.findall(r"\s", bare))
        possible &= {"compact", "spaced"} if not marks + blanks else {"compact"} if not blanks else {"spaced"}
        if blanks and not blanks == spaced == marks:
            return "free"
    if not possible:
        return "either"
    return "spaced" if "spaced" in possible else "compact"


def in_their_order(schema: dict[str, Any], examples: Sequence[Example]) -> tuple[dict[str, Any], list[str]]:
    """The schema with its properties in the order of the answers' keys, and a notice for each object that it changes.

    A grammar has the keys of an object in the order of the schema's properties.

    Raises:
        TellError: two answers have the same keys in different orders.
    """
    checked = Schema(schema)
    seen: dict[int, _Orders] = {}
    for example in examples:
        try:
            value = parse_strict(example.answer)
        except ValueError:
            continue
        for part, path, keys in _objects(checked, checked.schema, value, ""):
            seen.setdefault(id(part), _Orders(part, path)).rows.setdefault(keys, example.origin)
    moved: dict[int, list[str]] = {}
    notices = []
    for number, orders in seen.items():
        wanted = orders.merged()
        if wanted != list(orders.part["properties"]):
            moved[number] = wanted
            place = f" of {brief(orders.path)}" if orders.path else ""
            shown = brief(", ".join(wanted), 120)
            notices.append(f"constrained answers have the keys{place} in the references' order: {shown}")
    return cast(dict[str, Any], _moved(checked.schema, moved)), notices


class _Orders:
    """The orders in which answers have the keys of one object of a schema, each with the first row of it."""

    def __init__(self, part: dict[str, Any], path: str) -> None:
        self.part, self.path = part, path
        self.rows: dict[tuple[str, ...], str] = {}

    def merged(self) -> list[str]:
        """An order of all properties that every row agrees with; the schema's own where the rows leave it open."""
        names = list(self.part["properties"])
        after: dict[str, set[str]] = defaultdict(set)  # the keys that come directly before each
        for keys in self.rows:
            for left, right in pairwise(keys):
                after[right].add(left)
        order: list[str] = []
        left_over = dict.fromkeys(names)
        while left_over:
            free = next((name for name in left_over if after[name].isdisjoint(left_over)), None)
            if free is None:
                raise self._disagree(left_over)
            order.append(free)
            del left_over[free]
        return order

    def _disagree(self, names: Iterable[str]) -> TellError:
        """The error of two rows that have a pair of keys in opposite orders, or of a longer circle of rows."""
        first: dict[tuple[str, str], str] = {}
        wanted, where = set(names), next(iter(self.rows.values()))
        what = f"the rows have {brief(', '.join(names), 120)} in different orders"
        for keys, origin in self.rows.items():
            kept = [key for key in keys if key in wanted]
            for i, left in enumerate(kept):
                for right in kept[i + 1 :]:
                    first.setdefault((left, right), origin)
                    if (other := first.get((right, left))) is not None:
                        where, what = origin, f"has {brief(left)} before {brief(right)}, and {other} has it after"
        remedy = f"A constraint has one order of keys: write them in one, or {OFF}."
        return TellError(what, where=where, remedy=remedy)


def _objects(checked: Schema, node: object, value: object, path: str) -> Iterator[tuple[dict, str, tuple[str, ...]]]:
    """Each subschema with properties that applies to an object in ``value``, its path, and the object's keys of it."""
    if not isinstance(value, (dict, list)):
        return
    for part in checked.parts(node):
        if isinstance(value, list):
            ahead = part.get("prefixItems")
            ahead = ahead if isinstance(ahead, list) else []
            for i, item in enumerate(value):
                yield from _objects(checked, ahead[i] if i < len(ahead) else part.get("items"), item, f"{path}[]")
        elif isinstance(named := part.get("properties"), dict):
            yield part, path, tuple(key for key in value if key in named)
            for key, below in named.items():
                if key in value:
                    yield from _objects(checked, below, value[key], f"{path}.{key}" if path else key)


def _moved(node: object, moved: dict[int, list[str]]) -> object:
    """A copy with the properties of some nodes, by their ``id``, in another order."""
    if isinstance(node, list):
        return [_moved(item, moved) for item in node]
    if not isinstance(node, dict):
        return node
    out = {key: _moved(value, moved) for key, value in node.items()}
    if (order := moved.get(id(node))) is not None:
        properties = out["properties"]
        assert isinstance(properties, dict)  # `moved` has nodes with properties alone
        out["properties"] = {name: properties[name] for name in order}
    return out
