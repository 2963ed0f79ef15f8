"""Prompts without answers from every layout of data files."""

from __future__ import annotations

import json

import pytest

from tell.data.unlabelled import load_prompts_of
from tell.errors import TellError

PAIR = {"prompt": "prompt", "answer": "completion"}


def write(tmp_path, rows, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(found) -> list[str]:
    return ["|".join(f"{turn.role[0]}:{turn.content}" for turn in example.prompt) for example in found.examples]


TURNS = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
ANSWER = {"role": "assistant", "content": "A"}
CASES = [
    (PAIR, {"prompt": "Q"}, "u:Q", False),
    (PAIR, {"prompt": "Q", "completion": "A"}, "u:Q", True),
    (PAIR, {"text": "Q"}, "u:Q", False),  # another known column
    (PAIR, {"text": "Q", "label": "A"}, "u:Q", True),
    (PAIR, {"instruction": "Q", "input": "more"}, "u:Q\nmore", False),
    (PAIR, {"mail": "Q"}, "u:Q", False),  # the only column
    ({"prompt": "mail", "answer": "kind"}, {"mail": "Q", "text": "no", "id": 3}, "u:Q", False),  # as in the task
    ({"prompt": "mail", "answer": "kind"}, {"mail": "Q", "kind": "A"}, "u:Q", True),
    ({"prompt": "q", "system": "s", "answer": "a"}, {"q": "Q", "s": "S"}, "s:S|u:Q", False),
    ({"messages": "messages"}, {"messages": TURNS}, "s:S|u:Q", False),
    ({"messages": "messages"}, {"messages": [*TURNS, ANSWER]}, "s:S|u:Q", True),
    ({"messages": "messages"}, {"messages": [*TURNS, ANSWER, TURNS[1]]}, "s:S|u:Q|a:A|u:Q", False),
    (PAIR, {"conversations": [{"from": "human", "value": "Q"}]}, "u:Q", False),
    (PAIR, {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "u:Q", True),
]


@pytest.mark.parametrize(("columns", "row", "prompt", "answered"), CASES)
def test_prompts_are_read_and_answers_ignored(columns, row, prompt, answered, tmp_path):
    found = load_prompts_of(write(tmp_path, [row, row]), columns)
    assert prompts(found) == [prompt, prompt] and not found.dropped
    assert {example.answer for example in found.examples} == {""} and found.examples[0].source == "pseudo"
    assert [example.origin for example in found.examples] == ["prompts.jsonl:1", "prompts.jsonl:2"]
    assert any("are ignored" in text for text in found.notices) == answered


def test_other_formats(tmp_path):
    (tmp_path / "a.csv").write_text("mail,kind\nQ1,x\n,y\nQ2,\n", encoding="utf-8")
    found = load_prompts_of(str(tmp_path / "a.csv"), {"prompt": "mail", "answer": "kind"})
    assert prompts(found) == ["u:Q1", "u:Q2"]
    assert found.dropped == (("a.csv:3", "has no prompt (column 'mail' is empty)"),)
    assert any("column 'kind'" in text for text in found.notices)


BAD = [
    ("", "is empty"),
    ('{"a": 1, "b": 2}\n', "has the columns 'a', 'b', and none is known to hold prompts"),
    ('{"prompt": ""}\n', "no row has a prompt; the first has no prompt"),
    ('{"prompt": "x"\n', "JSON"),
]


@pytest.mark.parametrize(("text", "what"), BAD)
def test_bad_files_are_refused_with_a_remedy(text, what, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TellError, match=what) as error:
        load_prompts_of(str(path), PAIR)
    assert "bad.jsonl" in str(error.value.where) and error.value.remedy
