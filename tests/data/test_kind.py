import json
import random

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell.anchor.derive import derived_anchor
from tell.data.example import Example
from tell.data.kind import KINDS, are_labels, detect_kind, infer_schema, kind, load_schema, missing_classes, widen
from tell.errors import TellError


def make(answers):
    return [
        Example.pair(f"q{i}", a if isinstance(a, str) else json.dumps(a), origin=f"f.jsonl:{i}")
        for i, a in enumerate(answers, 1)
    ]


def tickets(n=60, seed=0):
    rng = random.Random(seed)
    return [
        {
            "category": rng.choice(["billing", "delivery", "other"]),
            "order": rng.choice([None, rng.randrange(10**6)]),
            "price": rng.choice([1, 2.5]),
            "mood": rng.choice(["good", "bad", None]),
            "products": rng.sample(["tent", "boots", "stove"], rng.randint(0, 3)),
            "summary": f"Customer {i} asks something",
            "meta": {"lang": rng.choice(["en", "is"])},
        }
        for i in range(n)
    ]


def test_json_with_a_strict_schema():
    kind = detect_kind(make(tickets()))
    assert (kind.name, kind.schema_inferred, kind.labels) == ("json", True, None)
    schema = kind.schema
    parts = schema["properties"]
    assert schema["additionalProperties"] is False and schema["required"] == list(parts)
    assert parts["category"]["enum"] == ["billing", "delivery", "other"]
    assert set(parts["order"]["type"]) == {"integer", "null"}
    assert parts["price"]["type"] == "number"
    assert parts["mood"]["enum"] == ["bad", "good", None]
    assert parts["products"]["items"]["enum"] == ["boots", "stove", "tent"]
    assert parts["summary"] == {"type": "string"}
    assert parts["meta"]["additionalProperties"] is False and parts["meta"]["properties"]["lang"]["enum"] == [
        "en",
        "is",
    ]
    unseen = jsonschema.Draft202012Validator(schema)
    assert all(unseen.is_valid(row) for row in tickets(seed=1))
    good = tickets(1)[0]
    for bad in ({**good, "extra": 1}, {**good, "category": "refund"}, {**good, "price": "1"}, {"category": "other"}):
        assert not unseen.is_valid(bad)


def test_keys_that_some_rows_lack_are_optional():
    rows = [row | ({"note": "x"} if i % 2 else {}) for i, row in enumerate(tickets())]
    schema = infer_schema(rows)
    assert "note" in schema["properties"] and "note" not in schema["required"]


def test_few_rows_or_rare_values_make_no_enumeration():
    assert "enum" not in infer_schema([{"a": "x"}, {"a": "y"}] * 4)["properties"]["a"]
    rare = [{"a": "x"}] * 20 + [{"a": "y"}, {"a": "z"}]  # a next row may well bring a fourth value
    assert "enum" not in infer_schema(rare)["properties"]["a"]
    sentence = [{"a": "This is a whole sentence of free text."}] * 30
    assert "enum" not in infer_schema(sentence)["properties"]["a"]


def test_keys_that_are_data_stay_open():
    schema = infer_schema([{"found": {f"name{i}": "PER"}} for i in range(40)])
    jsonschema.validate({"found": {"unseen": "PER"}}, schema)
    assert not jsonschema.Draft202012Validator(schema).is_valid({"found": {"unseen": 3}})


def test_fields_seen_only_empty_stay_open():
    schema = infer_schema([{"id": None, "more": {}, "list": []}] * 20)
    jsonschema.validate({"id": 7, "more": {"a": 1}, "list": ["x"]}, schema)
    assert not jsonschema.Draft202012Validator(schema).is_valid({"id": 7, "more": 1, "list": []})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(-1, 1)
    | st.sampled_from(["a", "b"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(st.lists(st.dictionaries(st.sampled_from("kl"), json_values, max_size=2), min_size=1, max_size=12))
def test_an_inferred_schema_is_valid_and_accepts_every_row(rows):
    schema = infer_schema(rows)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert all(map(validator.is_valid, rows))


@pytest.mark.parametrize(
    ("answers", "name", "labels"),
    [
        (["yes", "no"] * 5, "label", ("no", "yes")),
        (["positive ", "positive", "negative", "negative"], "label", ("negative", "positive")),
        (["1", "0", "1", "0"], "label", ("0", "1")),
        ([f"A whole answer number {i}" for i in range(9)], "text", None),
        (["This is a whole sentence of text"] * 9, "text", None),
        (["yes", "no"], "text", None),
        (['{"a": 1}', "no json", '{"a": 2}'], "text", None),
        (['{"a": NaN}', '{"a": 1}', '{"a": 2}'], "text", None),
        (["[1, 2]", "[3]"], "text", None),
    ],
)
def test_kinds(answers, name, labels):
    kind = detect_kind(make(answers))
    assert (kind.name, kind.labels) == (name, labels)
    assert kind.why.startswith(f"{name}: ") and "\n" not in kind.why


def test_the_row_that_is_not_json_is_named():
    assert "f.jsonl:2" in detect_kind(make(['{"a": 1}', "no json", '{"a": 2}'])).why


def test_overrides():
    assert detect_kind(make(["yes", "no"]), override="label").labels == ("no", "yes")
    assert detect_kind(make(tickets()), override="text").schema is None
    assert detect_kind(make(["[1]", "[2]"]), override="json").schema["items"] == {"type": "integer"}
    with pytest.raises(TellError, match="the answer is not JSON") as caught:
        detect_kind(make(['{"a": 1}', "no"]), override="json")
    assert caught.value.where == "f.jsonl:2"
    with pytest.raises(TellError, match="kind text takes no schema"):
        detect_kind(make(["a"]), override="text", schema={})


def test_a_given_schema_counts_the_answers_that_break_it():
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}}
    kind = detect_kind(make([{"a": 1}, {"a": 3}, {"a": 4}]), schema=schema)
    assert kind.schema is schema and not kind.schema_inferred
    assert "2 of 3 answers break it, the first is f.jsonl:2: 3 is not one of [1, 2]" in kind.why
    assert "break" not in detect_kind(make([{"a": 1}]), schema=schema).why


def test_load_schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "required": ["a"]}')
    assert load_schema(path) == {"type": "object", "required": ["a"]}


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ('{"type": "objekt"}', "schema.json", "is not a valid JSON Schema ('objekt'"),
        ('{"properties": {"a": {"minimum": "3"}}}', "schema.json", ", schema at $.properties.a.minimum"),
        ('{"type":\n "object"', "schema.json:2", "is not valid JSON"),
        ("[]", "schema.json", "is not a JSON object"),
        ("", "schema.json:1", "is empty"),
    ],
)
def test_bad_schema(tmp_path, content, where, what):
    path = tmp_path / "schema.json"
    path.write_text(content)
    with pytest.raises(TellError) as caught:
        load_schema(path)
    assert caught.value.where == str(tmp_path / where) and what in caught.value.what and caught.value.remedy


def test_missing_schema(tmp_path):
    with pytest.raises(TellError, match="no such file"):
        load_schema(tmp_path / "schema.json")


def test_an_inferred_schema_is_widened_to_the_test_answers():
    known = make([{"n": i, "price": i + 1} for i in range(4)])
    kind = detect_kind(known)
    assert widen(kind, known, make([{"n": 9, "price": 9}])) == (kind, None)
    test = make([{"n": 3, "price": 2.5}, {"n": 4, "price": 2, "note": "ripe"}])
    wide, said = widen(kind, known, test)
    validator = jsonschema.Draft202012Validator(wide.schema)
    assert all(validator.is_valid(json.loads(e.answer)) for e in [*known, *test])
    assert "2 of 2 answers break it, the first is f.jsonl:1: 2.5 is not of type 'integer'" in said
    assert said.endswith("answers are validated against a wider one")
    assert derived_anchor(wide, "user") == derived_anchor(kind, "user")  # nothing of the test rows is said to the model


def test_a_given_schema_and_answers_that_are_no_json_are_said():
    schema = {"type": "object", "required": ["a"]}
    kind, said = widen(detect_kind(make([{"a": 1}]), schema=schema), [], make([{"b": 1}, {"a": 1}]))
    assert kind.schema == schema and "break the schema given: 1 of 2 answers" in said
    inferred = detect_kind(make([{"a": 1}] * 3))
    kind, said = widen(inferred, make([{"a": 1}] * 3), make(["no json"]))
    assert kind is inferred and "1 of 1 answers" in said
    text = detect_kind(make(["some words of an answer"]))
    assert widen(text, [], make([{"a": 1}])) == (text, None)


def test_classes_that_one_side_lacks_are_said():
    train, test = make(["a", "a", "b", "b", "c", "c"]), make(["a", "d", "d"])
    kind = detect_kind(train)
    assert missing_classes(kind, train, test) == [
        "2 of 4 labels have no test row: b (2), c (2)",
        "1 of 4 labels have no training row: d (2)",
    ]
    assert missing_classes(kind, train, train) == []
    assert missing_classes(detect_kind(make(tickets())), train, test) == []


def test_labels():
    assert detect_kind(make(["Jos\u00e9", "Jose\u0301"] * 2)).labels == ("Jos\u00e9",)
    assert are_labels(["a", "b"] * 3) and not are_labels(["a", "b", "c"]) and not are_labels(["x" * 50] * 9)


def test_an_answer_with_half_of_a_pair_is_no_json():
    with pytest.raises(TellError, match=r"f.jsonl:1: the answer is not JSON \(contains half of a surrogate pair"):
        detect_kind(make(['{"a": "\\ud83d"}']), override="json")


def test_a_kind_is_declared_once_and_tried_in_order():
    assert list(KINDS) == ["json", "labels", "label", "text"]
    with pytest.raises(ValueError, match="'text' is declared twice"):
        kind("text")(KINDS["text"])
