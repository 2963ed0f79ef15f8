"""Recast rows ask what a rule can answer, and the answer is right."""

from __future__ import annotations

import json

import pytest

from tell.data.builtin import load_builtin
from tell.data.example import Example, Message
from tell.data.recast import KEYS, LEAST_KEYS, LONGEST, MARK, MOST_KEYS, QUESTIONS, recast, recast_by, sentences

TEXT = 'Ann paid 12.50 for "Red Tea" in Oslo on 3 May. Was it 1,000 more? She said:\n- no\n- 2nd time'


def value(name: str, text: str = TEXT) -> object:
    return next(key for key in KEYS if key.name == name).value(text)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("numbers", ["12.50", "3", "1,000"]),
        ("first_number", "12.50"),
        ("first_sentence", 'Ann paid 12.50 for "Red Tea" in Oslo on 3 May.'),
        ("last_sentence", "- 2nd time"),
        ("first_word", "Ann"),
        ("longest_word", "paid"),
        ("capitalised", ["Red", "Tea", "Oslo", "May"]),
        ("quoted", ["Red Tea"]),
        ("sentences", 5),
        ("has_question", True),
        ("has_list", True),
        ("has_number", True),
        ("length", "short"),
        ("ending", "other"),
    ],
)
def test_keys_say_what_stands_in_the_text(name, expected):
    assert value(name) == expected


def test_every_key_has_a_case():
    cases = test_keys_say_what_stands_in_the_text.pytestmark[0].args[1]
    assert {name for name, _ in cases} == {key.name for key in KEYS}


def test_what_is_not_there():
    text = "Nothing here at all."
    assert value("first_number", text) is None and value("numbers", text) == value("capitalised", text) == []
    assert value("ending", text) == "period" and value("sentences", text) == 1
    assert value("first_word", "7 + 7 = x?") == "x" and value("has_question", "好吗？") is True


def test_sentences():
    assert sentences("One. Two!\n\nThree? (Four.)") == ["One.", "Two!", "Three?", "(Four.)"]
    assert sentences("一。二！") == ["一。", "二！"]
    assert sentences("...\n--\n") == []


def test_an_extraction_names_its_keys_and_answers_them():
    rows = load_builtin().examples
    shapes = set()
    for name, made in recast_by(rows, "json", 5).items():
        assert "\n" not in made.answer
        answer = json.loads(made.answer)
        assert LEAST_KEYS <= len(answer) <= MOST_KEYS
        shapes.add(tuple(answer))
        schema = [line for line in made.question.splitlines() if line.startswith("- ")]
        assert all(any(line.startswith(f"- {key} (") for line in schema) for key in answer)
        row = next(row for row in rows if row.hash == name)
        texts = [t.strip() for t in (row.question, row.answer) if f"Text:\n{t.strip()}" in made.question]
        assert any(answer == {key: value(key, text) for key in answer} for text in texts if text)
        assert made.origin == row.origin + MARK and made.source == "general"
    assert len(shapes) > 300  # keys and their order change from row to row


def test_a_question_lists_its_answers():
    rows = load_builtin().examples
    made = recast_by(rows, "label", 5)
    asked = set()
    for row in made.values():
        (question,) = [q for q in QUESTIONS if q.text in row.question]
        asked.add(question.text)
        assert row.answer in question.answers
        assert all(answer in row.question for answer in question.answers)
    assert asked == {question.text for question in QUESTIONS}
    for question in QUESTIONS:  # no question has one answer alone
        assert len({row.answer for row in made.values() if question.text in row.question}) > 1, question.text


def test_the_same_seed_gives_the_same():
    rows = load_builtin().examples[:50]
    first, again, other = (recast_by(rows, "json", seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert recast_by(rows[::-1], "json", 1) == first  # by row, not by place


def test_rows_that_cannot_be_recast():
    tool = Example.of(
        [Message("user", "What is it?", tools="[]"), Message("assistant", "It.")], source="general", origin="a:1"
    )
    assert recast(tool, "json", 1) is None
    long = Example.pair("word " * LONGEST, "Yes. " * LONGEST)
    assert recast(long, "json", 1) is None
    assert recast(Example.pair("???", "12 34"), "label", 1) is None
    short = recast(Example.pair("word " * LONGEST, "Yes."), "label", 1)
    assert short is not None and short.question.count("Yes.") == 1
