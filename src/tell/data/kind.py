"""What kind of task the answers show: JSON objects, short labels or free text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tell.data.example import Example
from tell.data.formats import check_file, read_text
from tell.errors import TellError
from tell.files import expanded

KindName = Literal["json", "label", "text"]

# An enumeration refuses values that it does not list, so it is inferred only where an unseen value is unlikely:
# by Good and Turing, the chance that the next value is new is about the share of values seen once.
ENUM_ROWS = 10
ENUM_VALUES = 24
ENUM_REPEATS = 3.0  # mean occurrences of a value
ENUM_NEW = 0.05
SHORT_CHARACTERS, SHORT_WORDS = 40, 5
SCHEMA_URI = "https://json-schema.org/draft/2020-12/schema"
LABEL_VALUES = 200
LABEL_REPEATS = 2.0


@dataclass(frozen=True)
class Kind:
    """The kind of a task.

    Attributes:
        name: ``json``, ``label`` or ``text``.
        schema: JSON Schema that answers are held to; kind json only.
        schema_inferred: the schema was inferred from the answers, not given.
        labels: the distinct answers, sorted; kind label only.
        why: one sentence for people.
    """

    name: KindName
    schema: dict[str, Any] | None
    schema_inferred: bool
    labels: tuple[str, ...] | None
    why: str


def detect_kind(
    examples: Sequence[Example],
    *,
    override: Literal["auto", "json", "label", "text"] = "auto",
    schema: dict[str, Any] | None = None,
) -> Kind:
    """Kind of the task from its answers.

    Args:
        examples: at least one.
        override: the kind, when the user knows better.
        schema: JSON Schema given by the user; it makes the kind json.

    Raises:
        TellError: kind json was asked for (or a schema given) and an answer is not JSON.
    """
    answers = [example.answer for example in examples]
    n = len(answers)
    if schema is not None and override in ("label", "text"):
        raise TellError(
            f"kind {override} has no use for a schema",
            where="--schema",
            remedy="Drop --schema, or set the kind to json.",
        )
    if override == "json" or schema is not None:
        values = [_parse_or_refuse(example) for example in examples]
        asked = "a schema was given" if schema is not None else "asked for"
        if schema is None:
            return Kind(
                "json", infer_schema(values), True, None, f"json: {asked}; the schema is inferred from {n} answers"
            )
        return Kind("json", schema, False, None, f"json: {asked}{_misfits(examples, values, schema)}")
    if override == "text":
        return Kind("text", None, False, None, "text: asked for")
    labels = tuple(sorted({answer.strip() for answer in answers}))
    if override == "label":
        return Kind("label", None, False, labels, f"label: asked for; {_count(labels, n)}")
    parsed = [_parse(answer) for answer in answers]
    objects = sum(isinstance(value, dict) for value in parsed)
    if objects == n:
        why = f"json: all {n} answers are JSON objects; the schema is inferred from them"
        return Kind("json", infer_schema(parsed), True, None, why)
    short = all(map(_is_short, labels))
    if short and len(labels) <= LABEL_VALUES and n >= LABEL_REPEATS * len(labels):
        return Kind("label", None, False, labels, f"label: {_count(labels, n)}")
    if objects > n / 2:
        bad = next(example for example, value in zip(examples, parsed, strict=True) if not isinstance(value, dict))
        why = f"text: {objects} of {n} answers are JSON objects, but not all; the first that is not is {bad.origin}"
    elif short:
        why = f"text: the answers are short, but {_count(labels, n)} repeat too little to be labels"
    else:
        why = f"text: the {n} answers are neither JSON objects nor few short labels"
    return Kind("text", None, False, None, why)


def load_schema(path: str | Path) -> dict[str, Any]:
    """Read a JSON Schema from a file.

    Raises:
        TellError: no such file, not JSON (with the line), not an object, or not a valid JSON Schema.
    """
    import jsonschema
    from jsonschema.validators import validator_for

    path = check_file(expanded(path), remedy="Check the path given to --schema.")
    text = read_text(path)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise TellError(
            "is empty" if not text.strip() else f"is not valid JSON ({getattr(error, 'msg', error)})",
            where=f"{path}:{line}",
            remedy="Give a JSON Schema in a JSON file.",
        ) from error
    if not isinstance(schema, dict):
        raise TellError("is not a JSON object", where=str(path), remedy='Write e.g. {"type": "object", ...}.')
    try:
        validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        at = "/".join(map(str, error.absolute_path)) or "the top"
        raise TellError(
            f"is not a valid JSON Schema (at {at}: {error.message})", where=str(path), remedy="Mend that key."
        ) from error
    return schema


def infer_schema(values: Sequence[Any]) -> dict[str, Any]:
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


def _tighten(schema: dict[str, Any], values: list[Any]) -> None:
    """Close objects and add enumerations, in place; ``values`` are all that stand where ``schema`` does."""
    for branch in schema.get("anyOf", ()):
        _tighten(branch, values)
    types = schema.get("type", ())
    types = {types} if isinstance(types, str) else set(types)
    if "object" in types:
        objects = [value for value in values if isinstance(value, dict)]
        parts = schema.get("properties", {})
        if len(parts) > ENUM_VALUES and not schema.get("required"):
            # Keys that vary from row to row are data (names, ids), not fields: describe what they hold.
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
                del part["type"]  # seen only empty, so nothing is known of what it may hold
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
    return sorted(counts) if once <= ENUM_NEW * n and all(map(_is_short, counts)) else None


def _is_short(text: str) -> bool:
    return len(text) <= SHORT_CHARACTERS and "\n" not in text and len(text.split()) <= SHORT_WORDS


def _count(labels: Sequence[str], n: int) -> str:
    return f"{n} answers with {len(labels)} different value{'s' if len(labels) > 1 else ''}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")  # Python reads NaN and Infinity, JSON has neither


def _parse(answer: str) -> Any:
    """The parsed answer; the text itself where it is not JSON."""
    try:
        return json.loads(answer, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return answer


def _parse_or_refuse(example: Example) -> Any:
    try:
        return json.loads(example.answer, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise TellError(
            f"the answer is not JSON ({error})",
            where=example.origin,
            remedy="Mend that answer, or leave out --schema and the kind json.",
        ) from error


def _misfits(examples: Sequence[Example], values: Sequence[Any], schema: dict[str, Any]) -> str:
    """A clause that counts the answers which break the schema; empty when none does."""
    from jsonschema.validators import validator_for

    validator = validator_for(schema)(schema)
    first, count = "", 0
    for example, value in zip(examples, values, strict=True):
        error = next(validator.iter_errors(value), None)
        if error is not None:
            count += 1
            message = error.message if len(error.message) <= 120 else f"{error.message[:117]}..."
            first = first or f"{example.origin}: {message}"
    return f"; {count} of {len(values)} answers break it, the first is {first}" if count else ""
