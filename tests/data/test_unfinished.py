"""Faults of a JSON text that is still being written: those that no further text can mend."""

from __future__ import annotations

import pytest

from tell.data.schema import Schema
from tell.data.unfinished import NOT_JSON, schema_faults

SCHEMA = {
    "type": "object",
    "required": ["a", "b"],
    "additionalProperties": False,
    "properties": {
        "a": {"enum": ["xx", "y"]},
        "b": {"type": "integer", "minimum": 10},
        "l": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "object", "required": ["q"]}},
    },
}
OPEN = (
    "",
    " ",
    "{",
    '{"b": 1',
    '{"a": "x',
    '{"a',
    '{"l": [',
    '{"l": [{',
    '{"l": [{"q": 1}',
    '{"l": [{"q": {"z": [',
    '{"b": -',
)
BROKEN = {
    **{"So": "not JSON", '{"a" 1': "not JSON", "[": "'object'", '{"a": "z"': "one of", '{"c": 1': "Additional"},
    **{
        '{"b": 1,': "minimum",
        '{"b": 1}': "required",
        '{"b": "s"': "'integer'",
        '{"l": [{}': "required",
        '{"l": 1': "'array'",
    },
    **{'{"l":[{"q":1}]': "short", '{"l":[{"q":1},{"q":1},{': "long", '{"a":"y","b":12} and': "not JSON"},
}


def first(text: str, schema: dict = SCHEMA, **options) -> str:
    return next(schema_faults(Schema(schema), text, **options), "")


@pytest.mark.parametrize("text", OPEN)
def test_what_can_still_be_mended_is_no_fault(text):
    assert first(text, whole=False) == "" and first(text)


@pytest.mark.parametrize("text", BROKEN)
def test_what_cannot_be_mended_is_one(text):
    assert BROKEN[text] in first(text, whole=False)


def test_no_prefix_of_a_valid_text_has_a_fault():
    text = '{"l": [{"q": 1}, {"q": "]}\\" 1"}], "b": 12, "a": "xx"}'  # keys in another order than the schema's
    assert [first(text[:n], whole=False) for n in range(len(text) + 1)] == [""] * (len(text) + 1)
    assert first(text) == "" and first(text[:-1]) == NOT_JSON


def test_what_depends_on_the_rest_waits_for_it():
    schema = {"if": {"required": ["z"]}, "else": {"properties": {"a": {"const": 1}}}}
    assert first('{"a": 2, ', schema, whole=False) == "" and first('{"a": 2}', schema, whole=False)
