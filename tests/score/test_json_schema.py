import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell.errors import TellError
from tell.files import read_jsonl, write_json, write_jsonl
from tell.score.json_schema import JsonScorer, parse_strict

SCHEMA = {
    "type": "object",
    "properties": {
        "category": {"enum": ["billing", "delivery", "other"]},
        "amount": {"type": ["number", "null"]},
        "items": {"type": "array", "items": {"type": "string"}},
        "urgent": {"type": "boolean"},
        "summary": {"type": "string"},
    },
    "required": ["category", "amount", "items", "urgent", "summary"],
    "additionalProperties": False,
}
GOLD = {
    "category": "billing",
    "amount": 12.5,
    "items": ["lamp", "bulb", "lamp"],
    "urgent": True,
    "summary": "Charged twice for one lamp and two bulbs",
}


def other(**changes) -> str:
    return json.dumps({**GOLD, **changes})


def score_one(answer: str, reference: dict | None = None, schema: dict = SCHEMA) -> dict[str, float]:
    metrics = JsonScorer(schema).score([answer], [json.dumps(GOLD if reference is None else reference)])
    return {name: metric.value for name, metric in metrics.items()}


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "the answer is empty"),
        ("```json\n{}\n```", "code fence"),
        ("{} Hope this helps!", "text follows"),
        ('Here it is: {"a": 1}', "starts with other text"),
        ('{"a": 1', "ends too early"),
        ('{"a": "one', "ends too early"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "too large"),
        ('{"a": 1, "a": 1}', "key a occurs twice"),
        ("{'a': 1}", "at character 2"),
        ('{"a": 1,}', "at character"),
        ('{"a": "line\nbreak"}', "control character"),
        ("[" * 200_000, "nested too deeply"),
        ("\ufeff{}", "starts with other text"),
        ("\u00a0{}", "JSON"),
    ],
)
def test_strict_parser_refuses(answer, why):
    reason = JsonScorer(SCHEMA).why_invalid(answer)
    assert reason.startswith("not JSON: ") and why.lower() in reason.lower()
    assert score_one(answer)["valid_json"] == score_one(answer)["schema_adherence"] == 0


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**60), 2**60)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=15,
    )
)
def test_strict_parser_reads_all_that_json_writes(value):
    assert parse_strict(f" \n{json.dumps(value)}\t\r\n") == value
    assert parse_strict(json.dumps(value, ensure_ascii=False)) == value


def test_perfect_answer_scores_one_in_everything():
    scores = score_one(f"\n {json.dumps(GOLD)} \n")
    assert set(scores) == {
        *("schema_adherence", "valid_json", "field_accuracy", "exact_match", "item_f1"),
        *("field:category", "field:amount", "field:items", "field:urgent"),
    }  # the summary is free text
    assert set(scores.values()) == {1.0}


@pytest.mark.parametrize(
    ("changes", "adheres", "equal"),
    [
        ({"category": " BILLING "}, 0, 4),  # equal without case, but not the schema's spelling
        ({"category": "delivery"}, 1, 3),
        ({"amount": 12.50}, 1, 4),
        ({"amount": "12.5"}, 0, 3),
        ({"amount": None}, 1, 3),
        ({"items": ["lamp", "lamp", " bulb"]}, 1, 4),  # a multiset
        ({"items": ["lamp", "bulb"]}, 1, 3),
        ({"items": ["Lamp", "bulb", "lamp"]}, 1, 3),  # no enumeration, so case counts
        ({"urgent": 1}, 0, 3),  # true is not 1
        ({"summary": "Something else"}, 1, 4),
        ({"summary": 5}, 0, 4),
        ({"note": "extra"}, 0, 4),
    ],
)
def test_field_comparison(changes, adheres, equal):
    scores = score_one(other(**changes))
    assert scores["valid_json"] == 1
    assert scores["schema_adherence"] == adheres
    assert scores["field_accuracy"] == equal / 4
    assert scores["exact_match"] == (equal == 4)


def test_numbers_compare_as_numbers():
    assert score_one(other(amount=3), {**GOLD, "amount": 3.0})["field:amount"] == 1
    assert score_one('{"amount": 3e0}', {"amount": 3})["exact_match"] == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (other(extra=1), "extra key extra"),
        ('{"category": "billing"}', "missing key amount, items, urgent, summary"),
        (other(category="refund"), "wrong value for category: refund (not one of billing, delivery, other)"),
        (other(amount="5"), "wrong value for amount: 5 (not of type number or null)"),
        (other(items=["a", 2]), "wrong value for items.1: 2 (not of type string)"),
        ("[1]", "wrong value for the whole answer: [1] (not of type object)"),
        (json.dumps(GOLD), None),
    ],
)
def test_why_invalid(answer, reason):
    assert JsonScorer(SCHEMA).why_invalid(answer) == reason


def test_reasons_stay_short():
    scorer = JsonScorer({"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}})
    assert len(scorer.why_invalid(json.dumps({"a": "x" * 10_000}))) < 150
    assert len(scorer.why_invalid(json.dumps({"a": list(range(5000))}))) < 150


def test_reference_may_lack_keys_and_may_be_no_json():
    scorer = JsonScorer(SCHEMA)
    answers = [other(), other(category="other"), other()]
    references = ['{"category": "billing"}', json.dumps(GOLD), "no JSON at all"]
    metrics = scorer.score(answers, references)
    assert metrics["field:amount"].per_row.tolist()[1] == 1
    assert np.isnan(metrics["field:amount"].per_row[[0, 2]]).all()
    assert metrics["field_accuracy"].value == pytest.approx((1 + 3 / 4) / 2)
    assert metrics["exact_match"].value == 0.5
    assert metrics["schema_adherence"].value == 1
    only_text = scorer.score(["{}"], ["no JSON"])
    assert set(only_text) == {"schema_adherence", "valid_json"}


def test_long_varied_strings_are_not_counted_but_closed_and_short_ones_are():
    scorer = JsonScorer({"type": "object"})
    topics = ["a parcel that never came at all", "a bill that is too high by far"]
    rows = [
        {"id": f"A-{i}", "topic": topics[i % 2], "text": f"The customer number {i} writes about something"}
        for i in range(10)
    ]
    references = [json.dumps(row) for row in rows]
    assert list(scorer.counted_fields(references)) == ["id", "topic"]
    assert list(scorer.counted_fields(['{"t": "顾客说他的包裹还没有到"}', '{"t": "账单上的金额不对请核实"}'])) == []


def test_long_enumerated_strings_are_counted_also_through_refs():
    wording = ["the parcel never came to the door", "the bill is much too high"]
    schema = {
        "$defs": {"Topic": {"enum": wording}},
        "type": "object",
        "properties": {"topic": {"anyOf": [{"$ref": "#/$defs/Topic"}, {"type": "null"}]}},
    }
    scorer = JsonScorer(schema)
    metrics = scorer.score(
        [json.dumps({"topic": t.upper()}) for t in wording], [json.dumps({"topic": t}) for t in wording]
    )
    assert metrics["field:topic"].value == 1
    assert metrics["schema_adherence"].value == 0


def test_answers_that_are_no_objects():
    assert score_one("[]")["field_accuracy"] == 0
    scores = score_one("[2, 1]", [1, 2], {"type": "array"})
    assert scores["schema_adherence"] == scores["exact_match"] == scores["field:answer"] == 1
    assert score_one('{"answer": [1, 2]}', [1, 2], {"type": "array"})["exact_match"] == 0


@pytest.mark.parametrize(
    ("answer", "is_format"),
    [
        (other(), True),
        ('{"category": 1, "amount": 2, "items": 3}', True),
        ('{"category": 1, "amount": 2}', False),
        ('{"x": 1, "y": 2, "z": 3}', False),
        ("Paris is the capital of France.", False),
        ("[]", False),
        ("5", False),
    ],
)
def test_is_task_format(answer, is_format):
    assert JsonScorer(SCHEMA).is_task_format(answer) is is_format


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strnig"}, "not a valid JSON Schema"),
        ({"properties": {"a": {"$ref": "#/$defs/None"}}}, "leads nowhere"),
        ({"$ref": "https://example.com/schema.json"}, "nothing is fetched"),
        ({"properties": {"a": {"pattern": "("}}}, r"schema at \$.properties.a.pattern: not a valid"),
    ],
)
def test_bad_schema_is_refused_with_its_place(schema, message):
    with pytest.raises(TellError, match=message):
        JsonScorer(schema)


def test_schema_may_have_properties_named_like_keywords():
    schema = {"properties": {"pattern": {"type": "string"}, "enum": {"enum": ["a"]}, "const": {"type": "string"}}}
    assert JsonScorer(schema).keys == ("pattern", "enum", "const")
    recursive = {"$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}}}, "$ref": "#/$defs/node"}
    scorer = JsonScorer(recursive)
    for depth, adheres in ((50, 1), (400, 0)):
        deep = '{"next": ' * depth + "{}" + "}" * depth
        assert scorer.score([deep], [deep])["schema_adherence"].value == adheres


def test_other_drafts():
    draft4 = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "properties": {"a": {"minimum": 1, "exclusiveMinimum": True}},
    }
    assert JsonScorer(draft4).why_invalid('{"a": 1}').startswith("wrong value for a")


def test_lengths_and_emptiness_are_checked():
    with pytest.raises(TellError, match="1 answers for 2 references"):
        JsonScorer(SCHEMA).score(["{}"], ["{}", "{}"])
    with pytest.raises(TellError, match="no test row"):
        JsonScorer(SCHEMA).score([], [])


def item_f1(answers: list[str], references: list[str], schema: dict = SCHEMA) -> float | None:
    found = JsonScorer(schema).score(answers, references).get("item_f1")
    return None if found is None else found.value


def test_item_f1_counts_items_over_all_rows():
    """Items are a multiset of their field, an answer without the list gives none, and rows are pooled."""
    gold = json.dumps(GOLD)  # lamp, bulb, lamp
    assert item_f1([gold], [gold]) == 1
    assert item_f1([other(items=["lamp", "cord"])], [gold]) == pytest.approx(2 * 1 / (2 + 3))
    assert item_f1([other(items=["lamp"] * 4)], [gold]) == pytest.approx(2 * 2 / (4 + 3))
    assert item_f1(["no JSON"], [gold]) == item_f1([other(items="lamp")], [gold]) == 0
    both = item_f1([other(items=["lamp", "cord"]), other(items=[])], [gold, other(items=["bulb"])])
    assert both == pytest.approx(2 * 1 / (2 + 4))
    found = JsonScorer(SCHEMA).score([gold, other(items=[])], [gold, other(items=[])])["item_f1"]
    assert found.value == 1 and np.isnan(found.per_row[1])  # neither side has an item


def test_item_f1_needs_lists_of_scalars():
    plain = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert item_f1(['{"a": 1}'], ['{"a": 1}'], plain) is None
    nested = {"type": "object", "properties": {"a": {"type": "array"}, "b": {"type": "array"}}}
    assert item_f1(['{"a": [[1]]}'], ['{"a": [[1]]}'], nested) is None
    same = '{"a": ["x"], "b": ["y"]}'
    assert item_f1(['{"a": ["y"], "b": ["x"]}'], [same], nested) == 0  # an item belongs to its field
    choice = {"type": "object", "properties": {"a": {"type": "array", "items": {"enum": ["Red", "blue"]}}}}
    assert item_f1(['{"a": ["red ", "blue"]}'], ['{"a": ["blue", "Red"]}'], choice) == 1


COMPOSED, DECOMPOSED = "Jos\u00e9", "Jose\u0301"  # the second is how macOS writes it


@pytest.mark.parametrize(("answer", "reference"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_unicode_forms_are_one(answer, reference):
    for enum in ([COMPOSED], [DECOMPOSED]):
        schema = {"type": "object", "properties": {f"n{DECOMPOSED}": {"enum": enum}}, "additionalProperties": False}
        scores = JsonScorer(schema).score(
            [json.dumps({f"n{answer}": answer})], [json.dumps({f"n{reference}": reference})]
        )
        assert {name: metric.value for name, metric in scores.items()} == dict.fromkeys(scores, 1.0)


@pytest.mark.parametrize("answer", ['{"urgency": "\\ud83d"}', '{"\\ud83d": 1}', '["\\ud83d"]'])
def test_half_of_a_surrogate_pair_is_scored_and_written(tmp_path, answer):
    """It cannot be encoded as UTF-8, and must not take the run's other answers with it."""
    scorer = JsonScorer({"type": "object", "properties": {"urgency": {"enum": ["low"]}}, "additionalProperties": False})
    assert scorer.score([answer], ['{"urgency": "low"}'])["schema_adherence"].value == 0.0
    why = scorer.why_invalid(answer)
    assert why == "not JSON: contains half of a surrogate pair (\\ud83d)"
    rows = [{"answer": answer, "why": why, "raw": "\ud83d é"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    write_json(tmp_path / "row.json", rows)
    assert json.loads((tmp_path / "row.json").read_text(encoding="utf-8")) == rows
