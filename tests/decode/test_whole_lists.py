"""Guides of answers that are a list of labels: each label once, then the answer ends, whatever the model says."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.test_guide import KINDS, guide_of, vocabulary  # noqa: F401  (a fixture)
from tell.data.closed import ClosedField, as_json, closed_fields
from tell.data.example import Example
from tell.data.kind import detect_kind
from tell.data.label_text import FORMS
from tell.decode.engine import Engine
from tell.decode.guide import Fields, Guide, Vocabulary
from tell.decode.json_cursor import ListCursor
from tell.decode.sampler import Decoding
from tell.rows.template import ChatTokenizer
from train.packed import load

ITEMS = ("red", "red wine", "blue", "ræð", "日本")


def field_of(form: str, values=ITEMS) -> ClosedField:
    spelled = values if FORMS[form].separator else tuple(map(as_json, values))
    return ClosedField((), "items", spelled, separator=FORMS[form].separator)


def written(words: Vocabulary, form: str, evidence, log_probs) -> list[str]:
    """The labels of the list that a guide writes with a model of these log probabilities, and ends."""
    guide, ids = guide_of(words, field_of(form), evidence), []
    for _ in range(150):
        decision = guide.decision(ids)
        assert decision is not None, words.chat.answer(ids)
        token = decision.pick(log_probs())
        if token in words.chat.stop_ids:
            found = FORMS[form].split(words.chat.answer(ids))
            assert found is not None, words.chat.answer(ids)
            return found
        ids.append(token)
    raise AssertionError(words.chat.answer(ids))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_list_has_the_labels_that_evidence_is_for(kind, form, vocabulary):  # noqa: F811
    words, rng = vocabulary(kind), np.random.default_rng(0)
    for chosen in (c for n in range(4) for c in itertools.combinations(range(5), n)):
        if not chosen and FORMS[form].separator:
            continue  # such a list has a label
        for fails, noise in ((-np.inf, 1.0), (-25.0, 0.0)):
            evidence = [50.0 if i in chosen else fails for i in range(5)] + [0.0, -np.inf]
            found = written(words, form, evidence, lambda: noise * rng.normal(size=words.chat.size))  # noqa: B023
            assert sorted(found) == sorted(ITEMS[i] for i in chosen), (form, chosen)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_label_twice_and_none_that_is_unknown(kind, form, vocabulary):  # noqa: F811
    words, lengths = vocabulary(kind), set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        evidence = [*rng.normal(size=5), 0.0, -np.inf]
        found = written(words, form, evidence, lambda: 4 * rng.normal(size=words.chat.size))  # noqa: B023
        assert set(found) <= set(ITEMS) and len(set(found)) == len(found), (seed, found)
        lengths.add(len(found))
    assert len(lengths) > 2 and (0 in lengths) <= (form == "json")


@given(st.lists(st.sampled_from(["a b", "c", "ß", ""]), max_size=5), st.data())
def test_the_cursor_of_a_list_with_separators(parts, data):
    text = "; ".join(parts)
    cursor = ListCursor("; ")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
        cursor.feed(text[start:end])
    *done, last = text.split(";")
    assert (cursor.done, cursor.text) == ([part.strip() for part in done], last)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_guided_answers_in_the_engine(family, form, tiny_model):
    chat = ChatTokenizer(tiny_model(family))
    words, engine = Vocabulary(chat), Engine(load(tiny_model(family)))
    fields, prompts = Fields(words, [field_of(form)], chat.stop_ids), [[11, 40, 57], [11, 40], [11, 40, 7, 9]]
    rng = np.random.default_rng(3)
    for rule in ({"greedy": True}, {"greedy": False, "temperature": 2.0, "top_k": 0}):
        evidence = rng.normal(size=(len(prompts), 7))
        evidence[:, 5:] = 0.0, -np.inf
        guides = [Guide(fields, [row], [np.full(7, -np.log(7))]) for row in evidence]
        answers = engine.generate(prompts, Decoding(90, chat.stop_ids, seed=1, **rule), guides=guides)
        for answer in answers:
            found = FORMS[form].split(chat.answer(answer.ids))
            assert answer.finish == "stop" and set(found) <= set(ITEMS) and len(set(found)) == len(found)


@pytest.mark.parametrize("form", FORMS)
def test_the_closed_field_of_a_task(form):
    rng = np.random.default_rng(0)
    lists = [[label for label in "abcd" if rng.random() < 0.5] or ["a"] for _ in range(60)]
    rows = [Example.pair(f"q{i}", FORMS[form].join(labels)) for i, labels in enumerate(lists)]
    (field,) = closed_fields(detect_kind(rows), rows)
    assert (field.name, field.kind, field.open, field.classes) == ("labels[]", "items", False, 4)
    assert field.words == dict(enumerate("abcd"))
    for row, labels in zip(rows, lists, strict=True):
        assert field.target(row.answer).tolist() == [label in labels for label in "abcd"]
    assert ClosedField.from_dict(field.to_dict()) == field
    assert ("separator" in field.to_dict()) == (form != "json")
    assert field.target("not a list of these").tolist() == [0] * 4 if field.separator else field.target("x") is None


@pytest.mark.parametrize("change", [{"separator": "and"}, {"path": ["x"]}, {"kind": "value"}, {"separator": 3}])
def test_a_damaged_field_is_refused(change):
    data = json.loads(json.dumps(field_of("commas").to_dict() | change))
    with pytest.raises((ValueError, TypeError)):
        ClosedField.from_dict(data)
