"""Detects the kind of a task from its answers: JSON objects, short labels, lists of labels or free text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tell.arm import KindName
from tell.data.example import Example
from tell.data.formats import check_file, read_text
from tell.data.json_text import parse_strict, read_json
from tell.data.label_text import FORMS, ListForm, are_labels, as_label, is_short, list_form, requested_form
from tell.data.schema import FIX_SCHEMA, Schema, SlowPattern
from tell.errors import TellError
from tell.files import expanded
from tell.registry import Registry
from tell.shown import brief

# An enumeration rejects values that it does not list, so it is inferred only where an unseen value is unlikely:
# by Good and Turing, the chance that the next value is new is about the share of values seen once.
ENUM_ROWS = 10
ENUM_VALUES = 24
ENUM_REPEATS = 3.0  # mean occurrences of a value
ENUM_NEW = 0.05
SCHEMA_URI = "https://json-schema.org/draft/2020-12/schema"
CLASSES_SHOWN = 5


@dataclass(frozen=True)
class Kind:
    """The kind of a task.

    Attributes:
        name: ``json``, ``label``, ``labels`` or ``text``.
        schema: JSON Schema that answers are validated against; kind json only.
        schema_inferred: the schema was inferred from the answers, not given.
        labels: the distinct labels, sorted; kinds label and labels only.
        why: one sentence for the user.
        shown: the schema of the training answers alone, where `widen` has made ``schema`` wider; what the model sees
            must not come from test rows.
        form: how answers list their labels, a name of `tell.data.label_text.FORMS`; kind labels only.
    """

    name: KindName
    schema: dict[str, Any] | None
    schema_inferred: bool
    labels: tuple[str, ...] | None
    why: str
    shown: dict[str, Any] | None = None
    form: str | None = None

    @property
    def list_form(self) -> ListForm | None:
        """How answers list their labels; None for other kinds than labels."""
        return FORMS[self.form] if self.form else None

    def labels_in(self, answer: str) -> tuple[str, ...]:
        """The labels of an answer, each once; empty for other kinds than label and labels, and where it is no list."""
        if self.list_form is not None:
            return tuple(dict.fromkeys(self.list_form.split(answer) or ()))
        return (as_label(answer),) if self.name == "label" else ()


class Answers:
    """The answers of a task, in the forms that detection needs."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.texts = [example.answer for example in examples]
        self.n = len(examples)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The distinct answers, sorted."""
        return _distinct(self.texts)

    @cached_property
    def parsed(self) -> list[object]:
        """The JSON value of each answer; the text itself where it is not JSON."""
        return [_parse(text) for text in self.texts]


Detect = Callable[[Answers, bool], Kind | None]
kind = KINDS = Registry[Detect]("kind")
"""Detectors in the order in which they are tried; ``@kind(name)`` declares one. A detector returns a `Kind`, or None
for answers of another kind, unless the kind was requested."""


def detect_kind(
    examples: Sequence[Example], *, override: Literal["auto"] | KindName = "auto", schema: dict[str, Any] | None = None
) -> Kind:
    """Kind of the task from its answers.

    Args:
        examples: at least one.
        override: the kind, when the user knows better.
        schema: JSON Schema given by the user; it makes the kind json.

    Raises:
        TellError: kind json was requested (or a schema given) and an answer is not JSON.
    """
    answers = Answers(examples)
    if schema is not None:
        if override not in ("auto", "json"):
            remedy = "Drop --schema, or set the kind to json."
            raise TellError(f"kind {override} takes no schema", where="--schema", remedy=remedy)
        broken = _misfits(examples, [_parse_or_refuse(example) for example in examples], schema)
        return Kind("json", schema, False, None, f"json: a schema was given{'; ' if broken else ''}{broken}")
    if override != "auto":
        found = KINDS[override](answers, True)
    else:
        found = next((made for detect in KINDS.values() if (made := detect(answers, False))), None)
    assert found is not None  # any text is text
    return found


@kind("json")
def _json_kind(answers: Answers, requested: bool) -> Kind | None:
    n = answers.n
    if requested:
        values = [_parse_or_refuse(example) for example in answers.examples]
        why = f"json: requested; the schema is inferred from {n} answers"
    elif all(isinstance(value, dict) for value in answers.parsed):
        values, why = answers.parsed, f"json: all {n} answers are JSON objects; the schema is inferred from them"
    else:
        return None
    return Kind("json", infer_schema(values), True, None, why)


@kind("labels")
def _labels_kind(answers: Answers, requested: bool) -> Kind | None:
    form = requested_form(answers.texts) if requested else list_form(answers.texts)
    if form is None:
        return None
    lists = [form.split(text) for text in answers.texts]
    for example, found in zip(answers.examples, lists, strict=True):
        if found is None:
            remedy = f"Write every answer {form.words}, or set the kind to label or text."
            what = f"the answer {brief(example.answer)!r} is no list of labels {form.words}, as others are"
            raise TellError(what, where=example.origin, remedy=remedy)
    labels = _distinct(label for found in lists for label in found or ())
    if not labels:
        raise TellError("no answer names a label", where="task.kind", remedy="Set the kind to text.")
    each = sum(len(set(found or ())) for found in lists) / answers.n
    why = f"{answers.n} answers of {each:.1f} labels on average, {len(labels)} different ones, {form.words}"
    if empty := sum(not found for found in lists):
        why += f"; {empty} of them name no label"
    why = f"labels: {'requested; ' if requested else ''}{why}"
    return Kind("labels", None, False, labels, why, form=form.name)


@kind("label")
def _label_kind(answers: Answers, requested: bool) -> Kind | None:
    if not requested and not are_labels(answers.texts):
        return None
    why = f"label: {'requested; ' if requested else ''}{_count(answers.labels, answers.n)}{_python_lists(answers)}"
    return Kind("label", None, False, answers.labels, why)


@kind("text")
def _text_kind(answers: Answers, requested: bool) -> Kind:
    n, objects = answers.n, 0 if requested else sum(isinstance(value, dict) for value in answers.parsed)
    if requested:
        why = "requested"
    elif objects > n / 2:
        pairs = zip(answers.examples, answers.parsed, strict=True)
        bad = next(example.origin for example, value in pairs if not isinstance(value, dict))
        why = f"{objects} of {n} answers are JSON objects, but not all; the first that is not is {bad}"
    elif all(map(is_short, answers.labels)):
        why = f"the answers are short, but {_count(answers.labels, n)} repeat too little to be labels"
    else:
        why = f"the {n} answers are neither JSON objects nor few short labels"
    return Kind("text", None, False, None, f"text: {why}{_python_lists(answers)}")


def _python_lists(answers: Answers) -> str:
    """A clause for answers as pandas writes lists into CSV; they are read as text, since JSON has other quotes."""
    if not all(text.lstrip().startswith(("['", "[]")) for text in answers.texts):
        return ""
    return """; they look like Python lists: write ["a", "b"] for lists of labels"""


def _distinct(answers: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(map(as_label, answers))))


def misfits(kind: Kind, test: Sequence[Example]) -> str | None:
    """A notice about test answers that break the schema or are no list, so that no answer can match; None without."""
    if kind.list_form is not None:
        bad = [example.origin for example in test if kind.list_form.split(example.answer) is None]
        what = f"test rows are no list of labels {kind.list_form.words}, as the training rows are"
        return f"{len(bad)} of {len(test)} {what}, the first is {bad[0]}" if bad else None
    if kind.name != "json" or kind.schema is None:
        return None
    broken = _misfits(test, [_parse(example.answer) for example in test], kind.schema)
    which = "inferred from the training answers" if kind.schema_inferred else "given"
    return f"test rows break the schema {which}: {broken}" if broken else None


def widen(kind: Kind, known: Sequence[Example], test: Sequence[Example]) -> tuple[Kind, str | None]:
    """``kind`` with a schema that the test answers fit too, and a notice about them.

    Where a test answer breaks an inferred schema (a key that training rows lack, or 2.5 where they have whole numbers),
    the schema is inferred again, from all rows. A given schema stays.

    Args:
        known: the rows that ``kind`` was detected from.
    """
    said = misfits(kind, test)
    values = [_parse(example.answer) for example in test]
    if said is None or not kind.schema_inferred or not all(isinstance(value, (dict, list)) for value in values):
        return kind, said
    wide = infer_schema([*(_parse(example.answer) for example in known), *values])
    return replace(kind, schema=wide, shown=kind.schema), f"{said}; answers are validated against a wider one"


def missing_classes(kind: Kind, train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """Notices about labels that occur in training or test rows only."""
    if not kind.labels:
        return []
    trained, tested = (
        Counter(label for example in part for label in kind.labels_in(example.answer)) for part in (train, test)
    )
    parts = []
    for what, have, lack in (("test", trained, tested), ("training", tested, trained)):
        names = sorted(have.keys() - lack.keys())
        if names:
            more = f" and {len(names) - CLASSES_SHOWN:,} more" if len(names) > CLASSES_SHOWN else ""
            shown = ", ".join(f"{brief(name)} ({have[name]:,})" for name in names[:CLASSES_SHOWN])
            parts.append(f"{len(names):,} of {len(trained | tested):,} labels have no {what} row: {shown}{more}")
    return parts


def load_schema(path: str | Path) -> dict[str, Any]:
    """Read a JSON Schema from a file.

    Raises:
        TellError: no such file, not JSON (with the line), not an object, or not a valid JSON Schema.
    """
    path = check_file(expanded(path), remedy="Check the path given to --schema.")
    text = read_text(path)
    try:
        schema = read_json(text)
    except ValueError as error:
        what = "is empty" if not text.strip() else f"is not valid JSON ({getattr(error, 'msg', error)})"
        where = f"{path}:{getattr(error, 'lineno', 1)}"
        raise TellError(what, where=where, remedy="Use a JSON file with a JSON Schema.") from error
    if not isinstance(schema, dict):
        raise TellError("is not a JSON object", where=str(path), remedy='Write e.g. {"type": "object", ...}.')
    try:
        Schema(schema)
    except TellError as error:
        verb = "is" if error.what.startswith("not a") else "cannot be used:"
        raise TellError(f"{verb} {error.what}, {error.where}", where=str(path), remedy="Fix it there.") from error
    return schema


def infer_schema(values: Sequence[object]) -> dict[str, Any]:
    """A strict JSON Schema that all values satisfy.

    Objects allow no further keys and require those that all of them have; strings with few, short and repeated
    values become enumerations, in fields as in arrays.

    Args:
        values: parsed answers, at least one.
    """
    from genson import SchemaBuilder

    builder = SchemaBuilder(schema_uri=SCHEMA_URI)
    for value in values:
        builder.add_object(value)
    schema = builder.to_schema()
    _tighten(schema, list(values))
    return schema


def _tighten(schema: dict[str, Any], values: list[object]) -> None:
    """Close objects and add enumerations, in place; ``values`` are all that ``schema`` describes."""
    for branch in schema.get("anyOf", ()):
        _tighten(branch, values)
    types = schema.get("type", ())
    types = {types} if isinstance(types, str) else set(types)
    if "object" in types:
        objects = [value for value in values if isinstance(value, dict)]
        parts = schema.get("properties", {})
        if len(parts) > ENUM_VALUES and not schema.get("required"):
            # Keys that vary from row to row are data (names, ids), not fields: describe their values.
            del schema["properties"]
            schema["additionalProperties"] = infer_schema([part for value in objects for part in value.values()])
            del schema["additionalProperties"]["$schema"]
            return
        if "required" in schema:
            schema["required"] = [key for key in parts if key in schema["required"]]
        if parts:  # objects seen only empty say nothing about their keys
            schema["additionalProperties"] = False
        for key, part in parts.items():
            if part.get("type") == "null":
                del part["type"]  # seen only empty, so its items are unknown
            _tighten(part, [value[key] for value in objects if key in value])
    if "array" in types and "items" in schema:
        _tighten(schema["items"], [item for value in values if isinstance(value, list) for item in value])
    if types and types <= {"string", "null"}:
        choices = _choices(value for value in values if isinstance(value, str))
        if choices:
            schema["enum"] = [*choices, None] if "null" in types else choices


def _choices(strings: Iterable[str]) -> list[str] | None:
    """The values, sorted, if they look like a closed set."""
    counts = Counter(strings)
    n = counts.total()
    if n < ENUM_ROWS or len(counts) > ENUM_VALUES or n < ENUM_REPEATS * len(counts):
        return None
    once = sum(count == 1 for count in counts.values())
    return sorted(counts) if once <= ENUM_NEW * n and all(map(is_short, counts)) else None


def _count(labels: Sequence[str], n: int) -> str:
    return f"{n} answers with {len(labels)} different value{'s' if len(labels) > 1 else ''}"


def _parse(answer: str) -> object:
    """The parsed answer; the text itself where it is not JSON."""
    try:
        return parse_strict(answer)
    except ValueError:
        return answer


def _parse_or_refuse(example: Example) -> object:
    try:
        return parse_strict(example.answer)
    except ValueError as error:
        remedy = "Fix that answer, or leave out --schema and the kind json."
        raise TellError(f"the answer is not JSON ({error})", where=example.origin, remedy=remedy) from error


def _misfits(examples: Sequence[Example], values: Sequence[object], schema: dict[str, Any]) -> str:
    """A clause with the number of answers that break the schema; empty when none does."""
    from referencing.exceptions import Unresolvable

    validator = Schema(schema).validator
    first, count = "", 0
    for example, value in zip(examples, values, strict=True):
        try:
            error = next(validator.iter_errors(value), None)
        except SlowPattern as slow:
            remedy = "Write it without repetitions inside repetitions."
            raise TellError(str(slow), where=example.origin, remedy=remedy) from slow
        except Unresolvable as dead:
            what = f"the schema refers to {dead.ref!r}, which leads nowhere; nothing is fetched"
            raise TellError(what, where=example.origin, remedy=FIX_SCHEMA) from dead
        except (RecursionError, OverflowError):
            continue
        if error is not None:
            count += 1
            first = first or f"{example.origin}: {brief(error.message, 120)}"
    return f"{count} of {len(values)} answers break it, the first is {first}" if count else ""
