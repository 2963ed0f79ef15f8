"""What a constrained answer may be is taken from the schema, and from how the references are written."""

from __future__ import annotations

import json

import pytest

from tell.data.constraint import Constraint, check_choice, in_their_order, white_space
from tell.data.example import Example
from tell.data.kind import Kind, detect_kind
from tell.errors import TellError

OBJECT = {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}}


def rows(*answers: object) -> list[Example]:
    texts = [answer if isinstance(answer, str) else json.dumps(answer) for answer in answers]
    return [Example.pair(f"q{i}", text, origin=f"data.jsonl:{i + 1}") for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("answers", "space"),
    [
        (['{"a": 1, "b": [1, 2]}', "{}"], "spaced"),
        (['{"a":1,"b":[1,2]}'], "compact"),
        (['{"a":"x, y: z"}'], "compact"),  # in a string
        (['{"a": "\\", b"}'], "spaced"),
        (['{"a": 1}', '{"a":1}'], "either"),
        (['{"a": 1,"b":2}'], "free"),
        ([json.dumps({"a": [1]}, indent=2)], "free"),
        (["[ ]"], "free"),
        (["7", "{}"], "spaced"),
        (['{"a": 1}\n'], "spaced"),
    ],
)
def test_white_space(answers, space):
    assert white_space(answers) == space


def test_keys_in_the_order_of_the_references():
    schema = {"type": "object", "properties": {"x": {"type": "array", "items": OBJECT}, "y": {"$ref": "#/$defs/o"}}}
    schema["$defs"] = {"o": OBJECT}
    answers = rows({"y": {"c": 1, "a": 2}, "x": [{"b": 1, "a": 1}, {"a": 1, "c": 1}]}, {"y": {"c": 1, "b": 1}})
    found, notices = in_their_order(schema, answers)
    assert list(found["properties"]) == ["y", "x"]
    assert list(found["properties"]["x"]["items"]["properties"]) == ["b", "a", "c"]
    assert list(found["$defs"]["o"]["properties"]) == ["c", "a", "b"]
    assert len(notices) == 3 and notices[0] == "constrained answers have the keys in the references' order: y, x"
    assert in_their_order(found, answers) == (found, [])


def test_a_key_that_is_sometimes_missing_has_its_place():
    """genson puts a key that the first row lacks last."""
    answers = rows({"a": 1, "c": 3}, {"a": 1, "b": 2, "c": 3}, "no JSON")
    schema = {"type": "object", "properties": {"a": {}, "c": {}, "b": {}}}
    assert list(in_their_order(schema, answers)[0]["properties"]) == ["a", "b", "c"]


def test_rows_that_disagree_are_named():
    with pytest.raises(TellError) as caught:
        in_their_order(OBJECT, rows({"a": 1, "b": 2}, {"c": 1}, {"b": 1, "a": 2}))
    assert caught.value.where == "data.jsonl:3" and caught.value.what == "has b before a, and data.jsonl:1 has it after"
    circle = rows({"a": 1, "b": 2}, {"b": 1, "c": 2}, {"c": 1, "a": 2})  # no two of them
    with pytest.raises(TellError, match=r"data.jsonl:1: the rows have a, b, c in different orders"):
        in_their_order(OBJECT, circle)


def test_the_constraint_of_each_kind():
    labels = rows(*["yes", "no"] * 6)
    found, notices = Constraint.of(detect_kind(labels), labels)
    assert found.labels == ("no", "yes") and not notices
    objects = rows(*[{"a": i} for i in range(12)])
    kind = detect_kind(objects)
    wide = Kind("json", {"type": "object"}, True, None, "", shown=kind.schema)
    for one in (kind, wide):  # what only test rows have must not be allowed
        assert Constraint.of(one, objects)[0].json_schema["properties"] == kind.schema["properties"]
    assert Constraint.of(detect_kind(rows("A longer text of its own."), override="text"), []) is None
    assert Constraint.of(kind, rows('{"a": "\\u00e9"}'))[0].escapes
    assert not Constraint.of(kind, rows('{"a": "\\\\u00e9"}'))[0].escapes  # an escaped backslash


def test_written_and_read_again():
    found = Constraint.of_schema(
        {"properties": {"b": {}, "a": {}}, "$schema": "https://json-schema.org/draft/2020-12/schema"}
    )
    data = json.loads(json.dumps(found.to_dict()))
    assert Constraint.model_validate(data) == found and list(data["schema"]["properties"]) == ["b", "a"]
    for bad in ({}, {"schema": {}, "labels": ["a"]}, {"labels": ["a"], "white_space": "wide"}, {"schema": [], "x": 1}):
        with pytest.raises(ValueError, match="validation error"):
            Constraint.model_validate(bad)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (["a"], "not a JSON object"),
        (None, "not a JSON object"),
        ({"type": "objekt"}, "not a valid JSON Schema"),
        ({"$ref": "https://example.org/schema.json"}, "leads nowhere; nothing is fetched"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"pattern": "(a"}, "is not a 'regex'"),
    ],
)
def test_a_schema_of_anybody(schema, message):
    with pytest.raises(TellError, match=message):
        Constraint.of_schema(schema)


def test_the_choice_fits_the_kind():
    for choice, kind in (("off", "text"), ("schema", "json"), ("labels", "label")):
        check_choice(choice, kind)
    for choice, kind, remedy in (
        ("schema", "label", "labels"),
        ("labels", "json", "schema"),
        ("schema", "text", "off"),
    ):
        with pytest.raises(TellError, match=f"Use generate.constrain={remedy}"):
            check_choice(choice, kind)
