"""Scores answers that must be one JSON value and valid under a JSON Schema."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tell.data.json_text import items, nfc, parse_strict
from tell.data.schema import Schema, SlowPattern
from tell.errors import TellError
from tell.metric_names import FIELD
from tell.score.means import check_pairs, f1, mean_metric
from tell.score.scored import Metric, ScoredTask, scorer
from tell.shown import brief

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

# In scripts without spaces a character counts as a word: Chinese, Japanese, Thai.
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W_\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+")
_LONG_WORDS = 3  # references with a higher median number of words are free text, if they also vary
_VARIED = 0.5  # share of distinct references above which a string field varies
_MISSING = ("missing",)


@scorer("json", "schema_adherence", "valid_json", "field_accuracy", "exact_match", "item_f1", FIELD)
class JsonScorer:
    """Adherence to a JSON Schema, and agreement with the reference field by field.

    Metrics, all in [0, 1]:
        schema_adherence: the whole answer parses under a strict parser and validates. Binary.
        valid_json: the whole answer parses. Binary.
        field_accuracy: mean over rows of the share of the reference's counted fields that are equal.
        exact_match: every counted field is equal. Binary.
        item_f1: micro-averaged F1 of the items of counted lists, where there are lists of scalars; the harmonic mean of
            the share of given items that are right and the share of the reference's items that are given.
        ``field:<name>``: accuracy of one field over the rows whose reference has it. Binary.

    Strings compare in NFC, without surrounding whitespace, and case folded if the schema enumerates them; numbers by
    value; lists of scalars as multisets. A field of free text is not counted: one whose strings, outside any
    enumeration, have a median of more than three words and differ in more than half of the references. Rows whose
    reference is not JSON count for the first two only.

    The verdict is about field accuracy; where the schema asks for lists alone, about item F1, since most lists are
    empty and an answer without any item has most of the fields right.

    Args:
        schema: a JSON Schema of any draft; ``$schema`` names it, else draft 2020-12.

    Raises:
        TellError: it is not a valid JSON Schema, or a ``$ref`` leads nowhere (none is fetched).
    """

    primary = "field_accuracy"

    def __init__(self, schema: dict) -> None:
        self._checked = Schema(nfc(schema))
        self.schema = self._checked.schema
        self._validator = self._checked.validator
        fields = list(self._checked.properties(self.schema))
        self.keys = tuple(dict.fromkeys(key for key, _ in fields))
        if fields and all(isinstance(spec, dict) and spec.get("type") == "array" for _, spec in fields):
            self.primary = "item_f1"

    @classmethod
    def of(cls, task: ScoredTask) -> JsonScorer:
        if task.schema is None:
            raise TellError("kind json needs a JSON Schema", where="task.schema", remedy="Pass one with --schema.")
        return cls(task.schema)

    def _choices(self, node: object, seen: set[int]) -> Iterator[str]:
        """Every string that an enumeration at or below ``node`` names, case folded."""
        for part in self._checked.unseen_parts(node, seen):
            named = part.get("enum", []) if isinstance(part.get("enum", []), list) else []
            for value in [*named, part.get("const")]:
                if isinstance(value, str):
                    yield value.strip().casefold()
            below = [part.get("items"), part.get("additionalProperties"), *part.get("prefixItems", ())]
            for child in [*below, *part.get("properties", {}).values()]:
                yield from self._choices(child, seen)

    def why_invalid(self, answer: str) -> str | None:
        """A short reason why ``answer`` does not adhere to the schema; None if it does."""
        try:
            return self._violation(nfc(parse_strict(answer)))
        except ValueError as error:
            return f"not JSON: {error}"

    def _violation(self, value: object) -> str | None:
        from jsonschema.exceptions import best_match
        from referencing.exceptions import Unresolvable

        try:
            errors = list(self._validator.iter_errors(value))
        except SlowPattern as slow:
            return f"wrong value: {slow}"
        except (RecursionError, OverflowError, Unresolvable):
            return "wrong value: nested too deeply or too large to check"
        if not errors:
            return None
        rank = {"required": 0, "additionalProperties": 1, "unevaluatedProperties": 1}
        first = min(errors, key=lambda e: (len(e.absolute_path), rank.get(str(e.validator), 2)))
        return self._reason(best_match([first]) or first)

    def _reason(self, error: ValidationError) -> str:
        place = ".".join(str(part) for part in error.absolute_path)
        inside = f" in {place}" if place else ""
        keyword = cast(Any, error.validator_value)  # the keyword determines the type
        schema = cast(dict, error.schema)  # a schema that is true or false has no keywords
        if error.validator == "required" and isinstance(error.instance, dict):
            missing = [key for key in keyword if key not in error.instance]
            return f"missing key {brief(', '.join(missing))}{inside}"
        if error.validator == "additionalProperties" and isinstance(error.instance, dict):
            extra = self._checked.extra_keys(error.instance, schema)
            if keyword is False and extra:
                return f"extra key {brief(', '.join(extra))}{inside}"
        shown = brief(error.instance)
        if error.validator == "enum":
            why = f"not one of {brief(', '.join(brief(v) for v in keyword), 80)}"
        elif error.validator == "type":
            why = f"not of type {keyword if isinstance(keyword, str) else ' or '.join(keyword)}"
        else:
            why = f"breaks {error.validator} {brief(keyword)}"
        return f"wrong value for {place or 'the whole answer'}: {shown} ({why})"

    def is_task_format(self, answer: str) -> bool:
        """Whether the answer is a JSON object with at least half of the schema's keys.

        For a schema without keys: a JSON object, or a JSON list if the schema requires one.
        """
        value = _parse_or_missing(answer)
        if self.keys:
            return isinstance(value, dict) and 2 * sum(key in value for key in self.keys) >= len(self.keys)
        return isinstance(value, dict) or (isinstance(value, list) and self._validator.is_type(value, "array"))

    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        """Metrics by name, each over the same n rows. Field metrics are there if a reference is JSON.

        Raises:
            TellError: the lengths differ, or there is no row.
        """
        check_pairs(answers, references)
        values = [_parse_or_missing(answer) for answer in answers]
        parsed = [value is not _MISSING for value in values]
        adheres = [ok and self._violation(value) is None for ok, value in zip(parsed, values, strict=True)]
        metrics = {
            "schema_adherence": mean_metric(adheres, binary=True),
            "valid_json": mean_metric(parsed, binary=True),
        }
        counted = self.counted_fields(references)
        if not counted:
            return metrics
        equal = np.full((len(answers), len(counted)), np.nan)
        for i, (got, want) in enumerate(zip(values, map(_parse_or_missing, references), strict=True)):
            given = _fields(got) if isinstance(got, dict) == isinstance(want, dict) else {}
            gold = _fields(want)
            for column, (field, choices) in enumerate(counted.items()):
                if field in gold:
                    equal[i, column] = _normal(gold[field], choices) == _normal(given.get(field, _MISSING), choices)
        asked = (~np.isnan(equal)).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.nansum(equal, axis=1) / asked  # 0 / 0 is NaN: no counted field in this reference
        metrics["field_accuracy"] = mean_metric(share)
        metrics["exact_match"] = mean_metric(np.where(asked > 0, share == 1, np.nan), binary=True)
        if (items := _item_counts(values, references, counted)) is not None:
            metrics["item_f1"] = Metric(items, f1, f1(items))
        for column, field in enumerate(counted):
            metrics[FIELD + field] = mean_metric(equal[:, column], binary=True)
        return metrics

    def counted_fields(self, references: Sequence[str]) -> dict[str, frozenset[str]]:
        """The fields of the references that are compared, each with its enumerated strings (case folded).

        In the schema's order, then in the references'. A reference that is JSON but not an object is one field,
        ``answer``.
        """
        gold = [_fields(_parse_or_missing(text)) for text in references]
        specs: dict[str, list[object]] = {}
        for key, spec in self._checked.properties(self.schema):
            specs.setdefault(key, []).append(spec)
        counted = {}
        for field in dict.fromkeys([*specs, *(key for row in gold for key in row)]):
            choices = frozenset(c for spec in specs.get(field, []) for c in self._choices(spec, set()))
            present = [row[field] for row in gold if field in row]
            if present and not _free_text(present, choices):
                counted[field] = choices
        return counted


def _item_counts(
    answers: Sequence[object], references: Sequence[str], counted: dict[str, frozenset[str]]
) -> np.ndarray | None:
    """(n, 3): items of counted lists that are right, that are given, that the reference has; None: it has no list."""
    gold = [_items(_parse_or_missing(text), counted) for text in references]
    if all(row is None for row in gold):
        return None
    given = [_items(answer, counted) or Counter() for answer in answers]
    pairs = [(got, want or Counter()) for got, want in zip(given, gold, strict=True)]
    return np.array([[(got & want).total(), got.total(), want.total()] for got, want in pairs], dtype=np.float64)


def _items(value: object, counted: dict[str, frozenset[str]]) -> Counter[tuple] | None:
    """The items of the counted lists of scalars, each with its field; None without such a list."""
    lists = {
        field: part
        for field, part in _fields(value).items()
        if field in counted and isinstance(part, list) and not any(isinstance(x, (list, dict)) for x in part)
    }
    found = ((field, _normal(x, counted[field])) for field, part in lists.items() for x in part)
    return Counter(found) if lists else None


def _parse_or_missing(text: str) -> object:
    try:
        return nfc(parse_strict(text))
    except ValueError:
        return _MISSING


def _fields(value: object) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    return {} if value is _MISSING else {"answer": value}


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, (list, dict)):
        for item in items(value):
            yield from _strings(item)


def _free_text(values: Sequence[object], choices: frozenset[str]) -> bool:
    """Whether strings are long and varied: these have no single right wording, so equality is uninformative."""
    texts = [text for value in values for text in _strings(value) if text and text.casefold() not in choices]
    if not texts:
        return False
    words = statistics.median(len(_WORD.findall(text)) for text in texts)
    return words > _LONG_WORDS and len(set(texts)) > _VARIED * len(texts)


def _normal(value: object, choices: frozenset[str]) -> tuple:
    """A hashable form that is equal for equal values; the tag keeps true apart from 1."""
    if value is _MISSING or value is None:
        return _MISSING if value is _MISSING else ("null",)
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, str):
        text = value.strip()
        return ("string", text.casefold() if text.casefold() in choices else text)
    if isinstance(value, dict):
        return ("object", frozenset((key, _normal(item, choices)) for key, item in value.items()))
    if isinstance(value, list):
        parts = [_normal(item, choices) for item in value]
        nested = any(isinstance(item, (list, dict)) for item in value)
        return ("list", tuple(parts) if nested else frozenset(Counter(parts).items()))
    return ("number", value)
