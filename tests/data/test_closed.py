"""Which parts of an answer are decided among a few values, and which values they have."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tell.data.closed import LEAST_NEW, MISSING, ClosedField, closed_fields, opening, value_at
from tell.data.example import Example
from tell.data.kind import Kind, detect_kind, widen


def fields_of(properties: dict, answers: list, **schema) -> dict[str, ClosedField]:
    """Closed fields by name, of answers that are objects (or texts) under a schema of these properties."""
    kind = Kind("json", {"type": "object", "properties": properties, **schema}, False, None, "given")
    texts = [answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False) for answer in answers]
    return {field.name: field for field in closed_fields(kind, examples_of(texts))}


def examples_of(answers: list[str], prompts: list[str] | None = None) -> list[Example]:
    return [
        Example.pair(prompt, answer) for prompt, answer in zip(prompts or ["?"] * len(answers), answers, strict=True)
    ]


def named(*values: object) -> tuple[str, ...]:
    return tuple(json.dumps(value, ensure_ascii=False) for value in values)


@pytest.mark.parametrize(
    ("spec", "given", "values", "is_open"),
    [
        ({"enum": ["a", "b", "c"]}, ["a", "b"], ("a", "b", "c"), False),
        ({"type": "string", "enum": ["a", "b"]}, ["a", "b"], ("a", "b"), False),
        ({"enum": ["a", 1, None, True]}, ["a", 1], ("a", 1, None, True), False),
        ({"type": "boolean"}, [True, False], (True, False), False),
        ({"type": ["boolean", "null"]}, [True, None], (True, False, None), False),
        ({"type": ["number", "null"]}, [3, None], (None,), True),
        ({"type": ["array", "null"]}, [[], None], (None,), True),
        ({"anyOf": [{"const": "a"}, {"const": "b"}]}, ["a", "b"], ("a", "b"), False),
        ({"anyOf": [{"enum": ["a"]}, {"type": "null"}]}, ["a", None], ("a", None), False),
        ({"oneOf": [{"enum": ["a", "b"]}, {"type": "string"}]}, ["a", "something"], ("a", "b"), True),
        ({"$ref": "#/$defs/colour"}, ["red", "blue"], ("red", "blue"), False),
        ({"anyOf": [{"$ref": "#/$defs/colour"}, {"type": "null"}]}, ["red", None], ("red", "blue", None), False),
        ({"allOf": [{"enum": ["a", "b"]}]}, ["a", "b"], ("a", "b"), False),
    ],
)
def test_a_value_that_the_schema_names(spec, given, values, is_open):
    answers = [{"x": value, "free": str(i)} for i, value in enumerate(given)]
    found = fields_of(
        {"x": spec, "free": {"type": "string"}}, answers, **{"$defs": {"colour": {"enum": ["red", "blue"]}}}
    )
    assert list(found) == ["x"]
    field = found["x"]
    assert (field.path, field.kind, field.open) == (("x",), "value", is_open)
    assert sorted(field.values) == sorted(named(*values)) and field.classes == len(values) + is_open
    for value, answer in zip(given, answers, strict=True):
        at = field.values.index(json.dumps(value)) if json.dumps(value) in field.values else len(values)
        assert field.target(json.dumps(answer)).tolist() == np.eye(field.classes)[at].tolist()


@pytest.mark.parametrize(
    "spec",
    [{"type": "string"}, {"type": "number"}, {"type": "object"}, {}, True, {"const": "a"}],
    ids=str,
)
def test_what_is_not_closed(spec):
    """Free text and numbers that differ; and what is alike in all rows needs no decision."""
    values = ["a"] * 4 if spec == {"const": "a"} else [f"text {i}" for i in range(4)]
    assert fields_of({"x": spec}, [{"x": value} for value in values]) == {}


def test_a_field_that_never_varies_is_left_out():
    spec = {"x": {"enum": ["a", "b"]}, "y": {"enum": ["a", "b"]}}
    assert list(fields_of(spec, [{"x": "a", "y": "a"}, {"x": "a", "y": "b"}])) == ["y"]
    assert fields_of(spec, [{"x": "a"}, {"y": "b"}]) == {}  # a row without the field is no value of it
    assert fields_of({"x": {"type": ["string", "null"]}}, [{"x": "one"}, {"x": "two"}]) == {}  # null never


def test_nested_objects_and_references():
    spec = {
        "order": {"type": "object", "properties": {"state": {"enum": ["new", "paid"]}, "by": {"$ref": "#/$defs/who"}}}
    }
    defs = {"who": {"type": "object", "properties": {"vip": {"type": "boolean"}}}}
    answers = [
        {"order": {"state": "new", "by": {"vip": True}}},
        {"order": {"state": "paid", "by": {"vip": False}}},
        {"order": {"state": "paid"}},
        {"order": None},
    ]
    found = fields_of(spec, answers, **{"$defs": defs})
    assert {name: field.path for name, field in found.items()} == {
        "order.state": ("order", "state"),
        "order.by.vip": ("order", "by", "vip"),
    }
    targets = [found["order.by.vip"].target(json.dumps(answer)) for answer in answers]
    assert [None if t is None else t.tolist() for t in targets] == [[1, 0], [0, 1], None, None]


def test_a_recursive_schema_is_followed_once():
    node = {"type": "object", "properties": {"kind": {"enum": ["leaf", "twig"]}, "next": {"$ref": "#/$defs/node"}}}
    answers = [
        {"root": {"kind": "leaf", "next": {"kind": "leaf", "next": {"kind": "twig"}}}},
        {"root": {"kind": "twig", "next": {"kind": "twig"}}},
    ]
    found = fields_of({"root": {"$ref": "#/$defs/node"}}, answers, **{"$defs": {"node": node}})
    assert {"root.kind", "root.next.kind"} >= set(found) >= {"root.kind"}


@pytest.mark.parametrize(
    ("items", "values", "is_open"),
    [
        ({"enum": ["a", "b", "c"]}, ("a", "b", "c"), False),
        ({"$ref": "#/$defs/colour"}, ("red", "blue"), False),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "string"}]}, ("a", "b"), True),
        ({"anyOf": [{"const": "a"}, {"const": "b"}]}, ("a", "b"), False),
        ({"enum": [1, 10]}, (1, 10), False),
    ],
)
def test_a_list_of_named_items(items, values, is_open):
    answers = [{"x": [values[0]]}, {"x": []}, {"x": [values[1], values[0]]}, {}, {"x": "no list"}]
    spec = {"x": {"type": "array", "items": items}}
    field = fields_of(spec, answers, **{"$defs": {"colour": {"enum": ["red", "blue"]}}})["x[]"]
    assert field.is_set and field.open == is_open
    assert field.values == named(*values) and field.classes == len(values)  # further items are no class of their own
    targets = [field.target(json.dumps(answer)) for answer in answers]
    expected = [np.isin(np.arange(len(values)), wanted).astype(float).tolist() for wanted in ([0], [], [0, 1])]
    assert [t.tolist() for t in targets[:3]] == expected and targets[3:] == [None, None]


def test_a_list_that_may_be_empty():
    """Where its items are not known, only whether it has any is decided; where they repeat, the items are."""
    spec = {"x": {"type": "array", "items": {"type": "string"}}}
    found = fields_of(spec, [{"x": []}, {"x": ["one thing"]}, {"x": ["another"]}, {"x": ["third"]}])
    field = found["x empty"]
    assert list(found) == ["x empty"] and (field.kind, field.values, field.open, field.classes) == (
        *("empty", ("[]",), True),
        2,
    )
    assert field.target('{"x": [ ]}').tolist() == [1, 0] and field.target('{"x": ["new"]}').tolist() == [0, 1]
    assert fields_of(spec, [{"x": ["one"]}, {"x": ["two"]}]) == {}  # never empty
    objects = {"x": {"type": "array", "items": {"type": "object"}}}
    assert list(fields_of(objects, [{"x": []}, {"x": [{"a": 1}]}])) == ["x empty"]
    repeated = [{"x": []}, *[{"x": ["a", "b"]}] * 3, {"x": ["c"]}]
    assert list(fields_of(spec, repeated)) == ["x[]"]


def test_strings_that_repeat():
    """By Good and Turing the next value is new with the chance of the values seen once: closed up to one half."""
    spec = {"x": {"type": "string"}}
    for values, closed in (
        (["a", "a", "b", "b"], True),
        (["a", "a", "b", "c"], True),  # two of four were seen once
        (["a", "a", "b", "c", "d"], False),  # three of five
        (["a long text of more words than a label has"] * 3 + ["b"] * 3, False),
        (["two\nlines"] * 3 + ["b"] * 3, False),
    ):
        found = fields_of(spec, [{"x": value} for value in values])
        assert ("x" in found) == closed, values
        if closed:
            field = found["x"]
            assert field.open and field.values == named(*sorted(set(values)))
            assert field.target('{"x": "never seen"}').tolist() == [0] * len(set(values)) + [1]
    mixed = [{"x": value} for value in ["a", "a", "b", "b", 3]]
    assert fields_of({"x": {}}, mixed) == {}  # numbers too


def test_items_that_repeat_know_how_likely_a_new_one_is():
    spec = {"x": {"type": "array", "items": {"type": "string"}}}
    answers = [{"x": ["a", "b"]}, {"x": ["a", "c"]}, {"x": ["b"]}]
    field = fields_of(spec, answers)["x[]"]
    assert field.open and field.values == named("a", "b", "c") and field.new == pytest.approx(1 / 5)
    field = fields_of(spec, [{"x": ["a", "b"]}, {"x": ["a", "b"]}, {"x": ["b"]}])["x[]"]
    assert field.new == LEAST_NEW


def test_what_the_schema_names_comes_before_what_repeats():
    found = fields_of({"x": {"enum": ["a", "b", "c"]}}, [{"x": "a"}, {"x": "a"}, {"x": "b"}, {"x": "b"}])
    assert found["x"].values == named("a", "b", "c") and not found["x"].open


def test_labels_and_prefixes_of_one_another():
    kind = Kind("label", None, False, ("yes", "yes please", "no"), "given")
    (field,) = closed_fields(kind, examples_of(["yes", "no", "yes please"]))
    assert (field.path, field.name, field.kind, field.values) == ((), "label", "value", kind.labels)
    assert [field.target(f" {label}\n").tolist() for label in kind.labels] == np.eye(3).tolist()
    assert field.target("yes pl") is None and field.target("Yes") is None
    assert [field.described(c) for c in range(3)] == list(kind.labels)
    assert closed_fields(kind, examples_of(["yes", "yes"])) == []
    assert closed_fields(Kind("text", None, False, None, "given"), examples_of(["yes", "no"])) == []


def test_answers_that_are_not_json():
    found = fields_of({"x": {"enum": ["a", "b"]}}, ["no JSON", '{"x": "a"}', "[1]", '{"x": "b"}', "", '{"x": NaN}'])
    field = found["x"]
    assert [field.target(text) is None for text in ("no JSON", "[1]", "", '"a"', '{"x": "c"}')] == [True] * 5
    assert fields_of({"x": {"type": "string"}}, ["no JSON", "[]"]) == {}


def test_the_value_at_a_path():
    text = '{"a": {"b": [1, 2], "n": null}}'
    assert value_at(text, ("a", "b")) == [1, 2] and value_at(text, ("a", "n")) is None
    for path in (("a", "c"), ("a", "b", "0"), ("b",)):
        assert value_at(text, path) is MISSING
    assert value_at("{", ()) is MISSING


def test_words_that_name_a_value():
    field = ClosedField(("x",), "value", named("on_time", 3, None, "", True), open=True)
    assert [field.described(c) for c in range(field.classes)] == ["on time", "", "", "", "", ""]


def test_unicode_forms_are_one():
    """A value in macOS' decomposed form is the same one."""
    composed, decomposed = "Jos\u00e9", "Jose\u0301"
    found = fields_of({"x": {"enum": [decomposed, "Ana"]}}, [{"x": composed}, {"x": "Ana"}, {"x": decomposed}])
    assert found["x"].values == named(composed, "Ana")
    assert found["x"].target(json.dumps({"x": decomposed})).tolist() == [1, 0]


@pytest.mark.parametrize(
    "field",
    [
        ClosedField((), "value", ("a", "b")),
        ClosedField(("x", "y"), "items", named("a", "é"), True, 0.25),
        ClosedField(("x",), "empty", ("[]",), True),
    ],
)
def test_to_and_from_a_dictionary(field):
    data = json.loads(json.dumps(field.to_dict()))
    assert ClosedField.from_dict({**data, "later": 1}) == field


def test_strings_that_most_prompts_contain_are_copied_not_closed():
    kind = Kind("json", {"type": "object"}, True, None, "inferred")
    answers = [json.dumps({"who": name, "what": what}) for name, what in [("Ann", "ask"), ("Bob", "buy")] * 3]
    prompts = [f"{name} is here" for name in ("ANN", "Bob")] * 3
    assert [one.name for one in closed_fields(kind, examples_of(answers))] == ["who", "what"]
    assert [one.name for one in closed_fields(kind, examples_of(answers, prompts))] == ["what"]


@pytest.mark.parametrize(
    ("answers", "begin"),
    [
        (['{"a": 1, "b": 2}', '{"a": null}'], '{"a":'),
        (['{ "a" : 1}', '{ "a" : 2}'], '{ "a" :'),
        (['{"say \\"hi\\": \\\\": 1}', '{"say \\"hi\\": \\\\": 2}'], '{"say \\"hi\\": \\\\":'),
        (['{"a": 1}', '{"b": 1}'], ""),
        (['{"a": 1}', '{"a" : 1}'], ""),
        (["[1]", "[2]"], ""),
        (["{}", "{}"], ""),
        ([], ""),
    ],
)
def test_what_all_answers_begin_with(answers, begin):
    assert opening(Kind("json", {}, True, None, "inferred"), answers) == begin
    assert opening(Kind("text", None, False, None, "given"), answers) == ""


def test_what_only_test_rows_have_is_no_value():
    texts = [json.dumps({"tone": tone}) for tone in ("kind", "rude") * 10]
    known = examples_of(texts, [f"mail {i}" for i in range(20)])
    kind, _ = widen(detect_kind(known), known, examples_of([json.dumps({"tone": "odd"})]))
    assert "odd" in kind.schema["properties"]["tone"]["enum"]
    (field,) = closed_fields(kind, known)
    assert field.values == named("kind", "rude")
