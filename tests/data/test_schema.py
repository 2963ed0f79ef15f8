"""Schemas ready to validate with: nothing is fetched, no loops, patterns within a time limit."""

import json

import pytest

from tell.data import schema as schemas
from tell.data.example import Example
from tell.data.kind import SCHEMA_URI, detect_kind, load_schema
from tell.data.schema import Schema
from tell.errors import TellError
from tell.score.json_schema import JsonScorer

DOUBLING = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
BAD = [
    ({"$ref": "http://127.0.0.1:9/x.json"}, "leads nowhere; nothing is fetched"),
    ({"properties": {"a": {"$ref": "file:///etc/hostname"}}}, "leads nowhere; nothing is fetched"),
    ({"$ref": "http://["}, "leads nowhere"),
    ({"$schema": "http://["}, "not the name of a draft"),
    ({"$id": "http://["}, "its $id is no URI"),
    ({"$ref": "#/$defs/a"}, "leads nowhere"),
    *(({"properties": {name: {"$ref": "#/$defs/a"}}}, "leads nowhere") for name in ("default", "examples", "enum")),
    ({"$defs": {"const": {"items": {"$ref": "#/$defs/a"}}}}, "leads nowhere"),
    ({"patternProperties": {"enum": {"$ref": "http://127.0.0.1:9/x.json"}}}, "leads nowhere"),
    ({"definitions": {"default": {"pattern": "(a|a)*", "properties": {"a": {"$ref": "#/b"}}}}}, "leads nowhere"),
    ({"$ref": "#/examples", "examples": [{"$ref": "#/examples"}], "not": {"$ref": "#/b"}}, "leads nowhere"),
    ({"items": {"$ref": "#/default"}, "default": {"items": {"$ref": "#/b"}}}, "leads nowhere"),
    ({"default": {"anyOf": [{"$ref": "#/default"}]}, "$ref": "#/default"}, "leads back to itself"),
    ({"anyOf": [{"$ref": "#"}]}, "leads back to itself"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"not": {"$ref": "#/$defs/a"}}}}, "leads back to itself"),
    ({"$schema": 5}, "$schema is 5"),
    ({"$defs": {**DOUBLING, "a40": {}}, "$ref": "#/$defs/a0"}, "more than 10,000 subschemas"),
    ({"type": "objekt"}, "not a valid JSON Schema"),
    ({"patternProperties": {"^(a|a)*$": {}}, "unevaluatedProperties": False}, "might never end"),
    ({"pattern": "("}, "regex"),
    ({"patternProperties": {"[": {}}}, "not a"),
]


@pytest.mark.parametrize(("schema", "what"), BAD)
def test_schemas_that_cannot_be_used(tmp_path, schema, what):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    with pytest.raises(TellError) as caught:
        load_schema(path)
    assert what in caught.value.what and caught.value.where == str(path)
    with pytest.raises(TellError):
        detect_kind([Example.pair("q", "{}")], schema=schema)


GOOD = [
    ({"patternProperties": {"^n_": {}}, "unevaluatedProperties": False}, {"n_a": 1}, {"m_a": 1}),
    ({"type": "object", "properties": {"next": {"$ref": "#"}}}, {"next": {"next": {}}}, {"next": {"next": 1}}),
    (
        {"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"a": {"$ref": "#"}}, "pattern": "^x"},
        "xy",
        "y",
    ),
    ({"$id": "http://e.org/r", "$defs": {"a": {"$id": "i", "type": "string"}}, "items": {"$ref": "i"}}, ["x"], [1]),
    ({"patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False}, {"n_a": 1}, {"m_a": 1}),
    (
        {"patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": {"type": "null"}},
        {"b": None},
        {"b": 1},
    ),
    ({"patternProperties": {"^n_": {"type": "integer"}}}, {"b": 1}, {"n_b": "x"}),
    (
        {"properties": {"unevaluatedProperties": {"type": "null"}}, "patternProperties": {"(ab)*": {}}},
        {"unevaluatedProperties": None},
        {"unevaluatedProperties": 1},
    ),
    (
        {
            "properties": {"default": {"$schema": SCHEMA_URI, "$ref": "#/$defs/enum"}},
            "$defs": {"enum": {"type": "null"}},
        },
        {"default": None},
        {"default": 1},
    ),
    ({"enum": [{"properties": {"$schema": "x"}}]}, {"properties": {"$schema": "x"}}, {}),
    ({"properties": {"$schema": {"type": "string"}}, "enum": [{"$schema": "x"}]}, {"$schema": "x"}, {"$schema": 1}),
]


@pytest.mark.parametrize(("schema", "right", "wrong"), GOOD)
def test_schemas_that_can(schema, right, wrong):
    validator = Schema(schema).validator
    assert validator.is_valid(right) and not validator.is_valid(wrong)


def test_a_reference_that_is_dead_only_for_the_validator_is_refused(monkeypatch):
    monkeypatch.setattr(Schema, "_check", lambda *_: None)
    with pytest.raises(TellError, match=r"f.jsonl:3: the schema refers to '/\$defs/a', which leads nowhere"):
        detect_kind([Example.pair("q", "{}", origin="f.jsonl:3")], schema={"allOf": [{"$ref": "#/$defs/a"}]})


SLOW = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a|a)*$"}}}
STUCK = json.dumps({"a": "a" * 40 + "!"})


def test_a_slow_pattern_is_refused_with_the_data(monkeypatch):
    monkeypatch.setattr(schemas, "SECONDS", 0.05)
    with pytest.raises(TellError, match=r"f.jsonl:3: the pattern '\^\(a\|a\)\*\$' takes longer than 0.05 s"):
        detect_kind([Example.pair("q", STUCK, origin="f.jsonl:3")], schema=SLOW)


def test_a_slow_pattern_costs_an_answer_its_score_and_not_the_run(monkeypatch):
    monkeypatch.setattr(schemas, "SECONDS", 0.05)
    scorer = JsonScorer(SLOW)
    answers = [STUCK] * 20 + ['{"a": "aa"}']
    assert scorer.score(answers[-1:], answers[-1:])["schema_adherence"].value == 1.0
    assert scorer.score(answers, answers)["schema_adherence"].per_row.tolist()[:20] == [0.0] * 20
    assert "takes longer than" in scorer.why_invalid(STUCK)
