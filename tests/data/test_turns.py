"""What becomes of one record: loss, tool calls, verdicts, labels in lists, values that are not text."""

import datetime
import json
from decimal import Decimal

import pytest

from tell.data.cell_text import RowFault, as_text
from tell.data.columns import detect_layout
from tell.data.example import Example, Message, tools_of
from tell.data.sources import load
from tell.data.turns import MOST_CHARACTERS, to_messages
from tell.errors import TellError

QUESTION = {"role": "user", "content": "Weather?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w", "arguments": '{"town": 1}'}}]}
RESULT = {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": None}
ANSWER = {"role": "assistant", "content": "It rains."}
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {}}}]


def turns(row):
    return to_messages(row, detect_layout([row]))


def trained(row):
    return [m.content for m in turns(row) if m.role == "assistant" and m.trained]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_examples_inside_a_prompt_carry_no_loss():
    shown = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "COLOUR"}]
    row = {
        "prompt": [*shown, {"role": "user", "content": "oak"}],
        "completion": [{"role": "assistant", "content": "tree"}],
    }
    assert trained(row) == ["tree"] and [m.content for m in turns(row)] == ["red", "COLOUR", "oak", "tree"]
    assert trained({"messages": [*shown, QUESTION, ANSWER]}) == ["COLOUR", "It rains."]


@pytest.mark.parametrize("key", ["weight", "loss", "train"])
def test_turns_of_weight_zero_are_context(key):
    first = {"role": "assistant", "content": "wrong", key: 0}
    last = {"role": "assistant", "content": "apple", key: 1}
    row = {"messages": [QUESTION, first, QUESTION, last]}
    assert trained(row) == ["apple"] and len(turns(row)) == 4
    assert [m.content for m in turns({"messages": [QUESTION, last, QUESTION, first]})] == ["Weather?", "apple"]
    with pytest.raises(RowFault, match="no answer that carries loss"):
        turns({"messages": [QUESTION, first]})


def test_weights_between_are_refused():
    with pytest.raises(RowFault, match=r"turn 2 has the weight 0.5"):
        turns({"messages": [QUESTION, {**ANSWER, "weight": 0.5}]})


def test_tool_calls_and_results_are_context():
    messages = turns({"messages": [QUESTION, CALL, RESULT, ANSWER], "tools": TOOLS})
    assert [(m.role, m.trained) for m in messages if m.role != "user"] == [
        ("assistant", False),
        ("tool", True),
        ("assistant", True),
    ]
    call = messages[1].to_dict()["tool_calls"][0]
    assert call == {"type": "function", "function": {"name": "w", "arguments": {"town": 1}}}
    assert messages[2].to_dict() == {"role": "tool", "content": "rain", "tool_call_id": "c1"}
    assert tools_of(messages) == TOOLS and tools_of([*messages, *messages]) == TOOLS
    plain = [m for m in messages if m.role in ("user", "assistant")]
    assert tools_of(plain[1:]) is None


def test_tool_calls_of_other_formats():
    sharegpt = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "w", "arguments": {"town": 1}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    legacy = [
        QUESTION,
        {"role": "assistant", "content": None, "function_call": {"name": "w", "arguments": '{"town": 1}'}},
        {"role": "function", "name": "w", "content": "rain"},
        ANSWER,
    ]
    openai = turns({"messages": [QUESTION, CALL, RESULT, ANSWER], "tools": json.dumps(TOOLS)})
    for row in ({"conversations": sharegpt}, {"messages": legacy}):
        assert [m.role for m in turns(row)] == ["user", "assistant", "tool", "assistant"]
        assert turns(row)[1].extra == openai[1].extra


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([QUESTION, CALL], "ends with a tool call"),
        ([QUESTION, {**ANSWER, "tool_calls": CALL["tool_calls"]}], "ends with a tool call"),
        ([QUESTION, RESULT, ANSWER], "turn 2 is a tool's, and no tool was called"),
        (
            [QUESTION, {"role": "assistant", "tool_calls": [{"function": {}}]}, RESULT, ANSWER],
            "without a function's name",
        ),
        (
            [QUESTION, {"role": "assistant", "tool_calls": [{"name": "w", "arguments": "{"}]}, ANSWER],
            "that are not JSON",
        ),
    ],
)
def test_tool_calls_that_cannot_be_shown(messages, what):
    with pytest.raises(RowFault, match=what):
        turns({"messages": messages})


def test_null_keys_of_padded_structs_are_ignored(tmp_path):
    padded = {"weight": None, "tool_calls": None, "function_call": None, "name": None, "audio": None}
    row = {"messages": [{**QUESTION, **padded}, {**ANSWER, **padded}]}
    assert Example.of(turns(row), source="task", origin="").hash == Example.pair("Weather?", "It rains.").hash
    assert load(write(tmp_path / "f.jsonl", [row, row])).notices == ()


def test_loss_and_tools_change_the_hash():
    pair = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    other = [pair[0], Message("assistant", "b", False), *pair[2:]]
    tools = [Message("user", "a", tools="[]"), *pair[1:]]
    assert len({Example.of(m, source="task", origin="").hash for m in (pair, other, tools)}) == 3


def test_what_is_left_out_of_turns_is_said(tmp_path):
    rows = [
        {"messages": [QUESTION, {**ANSWER, "reasoning_content": "Clouds."}]},
        {"messages": [QUESTION, CALL, RESULT, {**ANSWER, "mood": "sad"}]},
    ]
    assert load(write(tmp_path / "f.jsonl", rows)).notices == (
        "f.jsonl: mood in the turns of 1 row is not used",
        "f.jsonl: reasoning_content in the turns of 1 row is not used; to train thoughts, write them into content",
        "f.jsonl: tool calls and results in 1 row are context, without loss",
    )


@pytest.mark.parametrize(
    ("rows", "kept", "reason"),
    [
        ([{"prompt": "a", "completion": "b", "label": i % 2 == 0} for i in range(4)], 2, "label is false"),
        ([{"prompt": "a", "completion": "b", "label": v} for v in ("True", "False")], 1, "label is false"),
        ([{"prompt": "a", "completion": "b", "label": v} for v in (False, None)], 1, "label is false"),
        ([{"text": "a", "label": "X", "answer": v} for v in ("accept", "reject", "ignore")], 1, "answer is reject"),
        ([{"messages": [QUESTION, ANSWER], "label": v} for v in (True, False)], 1, "label is false"),
        ([{"conversations": [QUESTION, ANSWER], "kto_tag": v} for v in (True, False)], 1, "kto_tag is false"),
        ([{"messages": [QUESTION, ANSWER], "label": v} for v in (1, 0, None)], 2, "label is 0"),
        ([{"messages": [QUESTION, ANSWER], "answer": v} for v in ("accept", "reject")], 1, "answer is reject"),
        ([{"prompt": "a", "completion": f"b{i}", "label": float(i % 2)} for i in range(4)], 2, "label is 0.0"),
        ([{"prompt": i, "completion": "ab"[i % 2], "label": i // 2} for i in range(4)], 2, "label is 0"),
    ],
)
def test_rejected_rows_are_left_out_with_the_reason(tmp_path, rows, kept, reason):
    loaded = load(write(tmp_path / "f.jsonl", rows))
    assert len(loaded.examples) == kept and len(loaded.dropped) == len(rows) - kept
    assert reason in {why for _, why in loaded.dropped}
    assert not any("left out" in text for text in loaded.notices)  # said by what lists the dropped rows


def test_answers_that_look_like_verdicts_are_answers():
    rows = [{"question": "q", "answer": a} for a in ("accept", "reject")]
    assert detect_layout(rows).verdict is None
    assert detect_layout([{"prompt": "q", "label": True}, {"prompt": "q", "label": False}]).verdict is None


def test_the_number_of_the_answers_class_is_no_verdict():
    rows = [{"prompt": f"q{i}", "completion": ("ham", "spam")[i % 2], "label": i % 2} for i in range(6)]
    layout = detect_layout(rows)
    assert layout.verdict is None and layout.unused == ("label",)
    assert detect_layout([{"text": "t", "label_text": "ham", "label": 0}]).verdict is None
    assert detect_layout([{"prompt": "q", "label": 1}, {"prompt": "q", "label": 0}]).verdict is None
    premises = [{"premise": "p", "hypothesis": "h", "label": 1}] * 2
    with pytest.raises(TellError, match="answer=label"):
        detect_layout(premises)


@pytest.mark.parametrize(("label", "answer"), [(["billing"], "billing"), ([3], "3"), ("billing", "billing")])
def test_one_label_in_a_list_is_the_label(label, answer):
    assert turns({"text": "t", "label": label})[-1].content == answer
    assert turns({"prompt": "t", "completion": ["billing"]})[-1].content == '["billing"]'


@pytest.mark.parametrize(
    ("label", "what"),
    [
        ([], "has no answer"),
        ([[0, 4, "TAG"]], "has a span"),
        (float("nan"), "no answer"),
    ],
)
def test_labels_that_are_none_or_spans(label, what):
    with pytest.raises(RowFault, match=what):
        turns({"text": "t", "label": label})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"caf\xc3\xa9", "café"),
        (datetime.date(2024, 1, 1), "2024-01-01"),
        (datetime.datetime(2024, 1, 1, 12, 30), "2024-01-01T12:30:00"),
        (Decimal("0.50"), "0.50"),
        (Decimal("1E+3"), "1000"),
        (None, ""),
        (float("nan"), ""),
        (
            {"on": datetime.date(2024, 1, 1), "sum": Decimal("2.50"), "n": Decimal(3)},
            '{"on": "2024-01-01", "sum": 2.5, "n": 3}',
        ),
    ],
)
def test_values_as_plain_text(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("value", "what"), [(b"\xff", "bytes that are not UTF-8"), (float("inf"), "not finite"), ([b"\xff"], "bytes")]
)
def test_values_without_a_text(value, what):
    with pytest.raises(RowFault, match=what):
        as_text(value)


@pytest.mark.parametrize("history", [5, {"a": 1}, "7", [5], [["a"]], "[" * 9000])
def test_histories_that_are_none(history):
    with pytest.raises(RowFault, match=r"no list of \[question, answer\] pairs"):
        turns({"query": "q", "response": "r", "history": history})


def test_endless_turns_and_deep_cells():
    with pytest.raises(RowFault, match=r"turn 1 has 10,000,001 characters"):
        turns({"prompt": "x" * (MOST_CHARACTERS + 1), "completion": "y"})
    with pytest.raises(RowFault, match="has no list of turns"):
        turns({"messages": "[" * 5000})


def test_half_of_a_pair_inside_a_json_answer(tmp_path):
    rows = [{"prompt": "q", "completion": '{"a": "y"}'}, {"prompt": "q", "completion": '{"a": "x\\ud83d"}'}]
    with pytest.raises(TellError, match=r"f.jsonl:2: has an answer in JSON with half of a surrogate pair \(\\ud83d\)"):
        load(write(tmp_path / "f.jsonl", rows))
    whole = {"prompt": "q", "completion": '{"a": "\\ud83d\\ude00"} and \\ud83d'}
    assert turns(whole)[-1].content == whole["completion"]
