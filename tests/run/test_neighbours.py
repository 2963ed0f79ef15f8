"""The training rows that are most similar to each test row (``eval.icl_select: nearest``)."""

from __future__ import annotations

import numpy as np
import pytest

from run.runs import config_of, open_session
from tell.anchor.anchor import Anchor
from tell.data.example import Example
from tell.errors import TellError
from tell.rows.template import ChatTokenizer
from tell.run.answers import Prompting
from tell.run.neighbours import most_similar, nearest_rows

TRAIN = [Example.pair(f"{what} {i}?", f"answer {i}") for i, what in enumerate(["Where is the fox", "def add", "9 8 7"])]


def test_the_most_similar_by_cosine_of_standardised_states():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(8, 5)) * [1, 10, 100, 1000, 0] + [0, 5, -5, 0, 3]  # one dimension tells nothing
    queries = rng.normal(size=(6, 5)) * [1, 10, 100, 1000, 1] + [0, 5, -5, 0, 3]
    found = most_similar(rows, queries)
    mean, deviation = rows[:, :4].mean(0), rows[:, :4].std(0)
    for query, order in zip(queries, found, strict=True):
        a = (query[:4] - mean) / deviation
        cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in (rows[:, :4] - mean) / deviation]
        assert order.tolist() == sorted(range(8), key=lambda i: -cosines[i])
    assert most_similar(rows, rows)[:, 0].tolist() == list(range(8))
    assert most_similar(rows[:1], queries).tolist() == [[0]] * 6
    assert most_similar(np.ones((3, 5)), queries).tolist() == [[0, 1, 2]] * 6  # equal ones in the order of the file


def test_a_row_is_most_similar_to_itself_and_the_most_similar_is_shown_last(tiny_model):
    model = tiny_model("llama")
    config = config_of(model, eval={"icl_select": "nearest", "icl_examples": 2})
    session = open_session(model, config)
    test = TRAIN[::-1]
    found = nearest_rows(session, ["base", "icl"], test, TRAIN)
    assert found.shape == (3, 2) and found[:, 0].tolist() == [2, 1, 0]
    chat, anchor = session.chat, Anchor("Sort this.")

    def prompts(examples: int, room: int = 10_000) -> tuple[list[str], int]:
        ids, used = Prompting(chat, anchor, (), examples, room, 7, found).prompts("icl", test, TRAIN)
        return [chat.backend.decode(row, skip_special_tokens=False) for row in ids], used

    shown, used = prompts(5)
    assert used == 2
    for text, example, of in zip(shown, test, found, strict=True):
        first, second = (text.index(TRAIN[i].answer) for i in (of[1], of[0]))
        assert first < second < text.rindex(example.question) and text.count(example.question) == 2
    one, used = prompts(1)
    assert used == 1 and all(TRAIN[of[0]].answer in text for text, of in zip(one, found, strict=True))
    longest = max(len(chat.encode(text)) for text in one)
    assert prompts(2, longest) == (one, 1)  # the least similar gives way
    assert prompts(2, 1)[1] == 0


def test_random_is_the_same_for_every_row_and_asks_for_no_states(tiny_model):
    model = tiny_model("llama")
    session = open_session(model, config_of(model))
    session._held = None  # nothing may compute
    assert nearest_rows(session, ["icl"], TRAIN, TRAIN) is None
    config = config_of(model, eval={"icl_select": "nearest"})
    session.config = config
    assert nearest_rows(session, ["base", "tell"], TRAIN, TRAIN) is None


def test_long_rows_are_not_shown(tiny_model):
    model = tiny_model("llama")
    long = Example.pair("again and again " * 40, "x")
    length = max(len(ChatTokenizer(model).encode(e.question)) for e in TRAIN) + 60
    config = config_of(model, eval={"icl_select": "nearest"}, train={"max_length": length})
    session = open_session(model, config)
    assert set(nearest_rows(session, ["icl"], TRAIN, [long, *TRAIN]).ravel()) <= {1, 2, 3}
    with pytest.raises(TellError, match=rf"eval\.icl_select: none of 1 training prompts has {length} tokens"):
        nearest_rows(session, ["icl"], TRAIN, [long])
