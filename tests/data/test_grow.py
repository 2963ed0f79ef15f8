"""New rows for a task that is split already, and examples written back to files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell.data.example import Example
from tell.data.grow import PARTS, grow
from tell.data.sources import load
from tell.data.split import Splits, split, with_validation
from tell.data.write_examples import write_examples
from tell.errors import TellError


def rows(names, answer="a"):
    return [Example.pair(f"question {name}", f"{answer}", origin=f"f:{name}") for name in names]


OLD = split(rows(range(40)), seed=3, test_fraction=0.3, validation_fraction=0.1)


def parts_of(grown):
    return {name: [e.hash for e in getattr(grown.parts, name)] for name in PARTS}


def grown_with(more, seed=3):
    return grow(OLD, more, seed=seed, test_fraction=0.3, validation_fraction=0.1)


@given(st.permutations(range(40, 70)), st.integers(0, 5))
def test_old_rows_stay_and_new_ones_go_by_content(order, seed):
    found, sorted_order = grown_with(rows(order), seed), grown_with(rows(range(40, 70)), seed)
    for name in PARTS:
        old = getattr(OLD, name)
        assert getattr(found.parts, name)[: len(old)] == old
        assert {e.hash for e in found.new[name]} == {e.hash for e in sorted_order.new[name]}
    assert {name: len(part) for name, part in found.new.items()} == {"train": 19, "validation": 2, "test": 9}
    hashes = [h for part in parts_of(found).values() for h in part]
    assert len(hashes) == len(set(hashes)) == 70


def test_the_seed_counts():
    assert parts_of(grown_with(rows(range(40, 70)), 3)) != parts_of(grown_with(rows(range(40, 70)), 4))


def test_copies_are_dropped_and_a_prompt_stays_in_its_part():
    asked = {name: getattr(OLD, name)[0] for name in PARTS}
    again = [Example.pair(e.question, "another answer", origin="g:1") for e in asked.values()]
    found = grown_with([*rows(range(50)), *again])
    assert found.repeated == 40 and found.bound == 3
    for name, example in zip(PARTS, again, strict=True):
        assert example in found.new[name]


def test_a_single_new_prompt_is_trained_on():
    found = grown_with(rows([99]))
    assert len(found.new["train"]) == 1 and not found.new["test"] and not found.new["validation"]


def test_given_validation_rows_are_neither_trained_on_nor_tested():
    parts = Splits(rows(range(10)), [], rows(range(10, 14)), 0)
    kept, lost = with_validation(parts, rows([8, 9, 10, 20]))
    assert [e.origin for e in kept.validation] == ["f:8", "f:9", "f:20"] and len(kept.train) == 8 and lost == 3
    for held in (rows(range(10)), rows([10, 11])):
        with pytest.raises(TellError, match=r"task\.validation"):
            with_validation(parts, held)


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "w", "arguments": {}}}]},
        {"role": "tool", "content": "sun", "tool_call_id": "1", "name": "w"},
        {"role": "assistant", "content": "Sunny.", "weight": 0},
        {"role": "user", "content": "and\n\u2028tomorrow?\u00e9"},
        {"role": "assistant", "content": '{"rain": true}'},
    ],
    "tools": [{"type": "function", "function": {"name": "w", "parameters": {}}}],
}


@pytest.mark.parametrize(
    "records",
    [
        [{"prompt": "a\r\nb ", "completion": " 1 "}, {"prompt": "{}", "completion": "[1, 2]"}],
        [{"text": "x", "label": "true"}, {"text": "y", "label": "false"}],
        [CONVERSATION, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
        [{"prompt": [{"role": "user", "content": "q"}], "completion": "a", "system": "s"}],
        [{"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]]}],
    ],
)
def test_written_examples_are_read_back_as_they_are(tmp_path: Path, records: list[dict]):
    source, copy = tmp_path / "given.jsonl", tmp_path / "copy.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    examples = load(str(source)).examples
    write_examples(copy, examples)
    assert [e.hash for e in load(str(copy)).examples] == [e.hash for e in examples]
