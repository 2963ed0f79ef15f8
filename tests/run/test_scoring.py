"""Prompts of each arm and the differences that are told."""

from __future__ import annotations

import numpy as np
import pytest

from tell.anchor.anchor import Anchor
from tell.data.example import Example, Message
from tell.models.find import find_model
from tell.models.flops import inference_flops
from tell.rows.template import ChatTokenizer
from tell.run.answers import Prompting, adapter_arm, answer_costs, arm_numbers, eval_numbers
from tell.score.means import mean_metric

ANCHOR = Anchor("Sort this mail.")
TRAIN = [Example.pair(f"training mail {i}", f"answer {i}") for i in range(6)]
TEST = [Example.pair("Where is my parcel?", "x"), Example.pair("Refund, please! " * 3, "y")]


def prompts(family_chat: ChatTokenizer, arm: str, *, room: int = 10_000, test=TEST, examples: int = 3, **options):
    anchor = options.get("anchor", ANCHOR)
    ids, used = Prompting(family_chat, anchor, (), examples, room, 5).prompts(arm, test, TRAIN)
    return [family_chat.backend.decode(row, skip_special_tokens=False) for row in ids], used


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def chat(request, tiny_model) -> ChatTokenizer:
    return ChatTokenizer(tiny_model(request.param))


def test_anchor_stands_once_where_an_arm_has_it(chat):
    for arm, times in (("base", 0), ("tell-anchor", 0), ("base+anchor", 1), ("sft", 1), ("tell", 1), ("icl", 1)):
        texts, used = prompts(chat, arm)
        assert [text.count(ANCHOR.text) for text in texts] == [times] * 2, arm
        assert used == (3 if arm == "icl" else 0)
        for text, example in zip(texts, TEST, strict=True):
            assert example.question.strip() in text and not text.rstrip().endswith(example.question.strip())


def test_icl_shows_whole_examples_before_the_question(chat):
    texts, used = prompts(chat, "icl")
    shown = [example for example in TRAIN if example.question in texts[0]]
    assert used == len(shown) == 3
    for text, example in zip(texts, TEST, strict=True):
        places = [text.index(e.question) for e in shown] + [text.index(e.answer) for e in shown]
        assert max(places) < text.index(example.question.strip())
        assert text.index(ANCHOR.text) < min(places)


def test_icl_shows_as_many_as_fit(chat):
    lengths = [
        max(len(ids) for ids in Prompting(chat, ANCHOR, (), n, 10_000, 5).prompts("icl", TEST, TRAIN)[0])
        for n in range(4)
    ]
    assert lengths == sorted(lengths)
    for n, length in enumerate(lengths):
        assert prompts(chat, "icl", room=length)[1] == n
    assert prompts(chat, "icl", room=lengths[0] - 1)[1] == 0  # the question itself is never left out
    assert prompts(chat, "icl", examples=50)[1] == len(TRAIN)


def test_icl_of_rows_with_system_messages(tiny_model):
    chat = ChatTokenizer(tiny_model("qwen3"))
    turns = (Message("system", "Be brief."), Message("user", "Where is it?"), Message("assistant", "x"))
    test = [Example.of(turns, source="task", origin="")]
    train = [Example.of((turns[0], Message("user", f"mail {i}"), turns[2]), source="task", origin="") for i in range(3)]
    anchor = Anchor("Sort this mail.", "system")
    ids, used = Prompting(chat, anchor, (), 2, 10_000, 1).prompts("icl", test, train)
    text = chat.decode(ids[0])
    assert used == 2 and text.count("Be brief.") == 1 and text.count("Sort this mail.") == 1


def told(language: str, word: str) -> Example:
    turns = (Message("system", f"Translate into {language}."), Message("user", word), Message("assistant", "x"))
    return Example.of(turns, source="task", origin="t:1")


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_each_row_is_asked_under_its_own_system_text(family, tiny_model):
    """Also with examples before it, whose own instructions go to their user turns; those that are the same do not."""
    chat = ChatTokenizer(tiny_model(family))
    if family == "mistral":  # it takes no system turn
        chat = ChatTokenizer(tiny_model(family, template=False))
    shown = [told("Polish", "one"), told("German", "two")]
    for arm, shots in (("icl", ()), ("tell", shown)):
        prompting = Prompting(chat, ANCHOR, shots, examples=2, room=999, seed=5)
        ids, _ = prompting.prompts(arm, [told("German", "three")], shown)
        text = chat.decode(ids[0])
        assert text.count("Translate into German.") == 1 == text.count("Translate into Polish.")
        assert text.index("German") < min(text.index(word) for word in ("one", "two", "three", "Polish"))
        assert "Translate into Polish.\n\none" in text and text.count(ANCHOR.text) == 1
        bare, _ = prompting.prompts(arm, TEST[:1], shown)
        assert "Translate into German.\n\ntwo" in chat.decode(bare[0])


def metric(*values: float) -> dict:
    return {"accuracy": mean_metric(np.array(values), binary=True)}


def test_differences():
    arms = {"base": metric(0, 0, 1, 0), "sft": metric(1, 0, 1, 0), "tell": metric(1, 1, 1, 1)}
    values, gaps = arm_numbers(arms, seed=1, samples=200)
    assert values["tell"]["accuracy"]["value"] == 1
    assert {name: gap["accuracy"]["value"] for name, gap in gaps.items()} == {
        "tell - base": 0.75,
        "tell - sft": 0.5,
        "sft - base": 0.25,
    }
    for names, pairs in (
        (["sft", "tell"], ["tell - sft"]),
        (["base", "sft"], ["sft - base"]),
        (["tell"], []),
        (["sft", "icl", "general"], ["icl - sft", "general - sft"]),
    ):
        _, gaps = arm_numbers({name: metric(1, 0) for name in names}, seed=1, samples=100)
        assert list(gaps) == pairs


def test_a_metric_that_only_one_arm_has():
    arms = {"base": metric(0, 1), "tell": {**metric(1, 1), "exact": mean_metric(np.array([0.0, 1.0]))}}
    _, gaps = arm_numbers(arms, seed=1, samples=100)
    assert list(gaps["tell - base"]) == ["accuracy"]


def test_adapter_arms():
    assert [adapter_arm(arm) for arm in ("base", "base+anchor", "icl", "sft", "tell", "tell-anchor")] == [
        *(None, None, None, "sft", "tell", "tell")
    ]


def test_answer_costs_count_what_was_fed_and_drawn(tiny_model):
    """3 + 2 answer tokens fed, 3 drawn with the end of turn; an answer that was cut has no end and 4 drawn."""
    arch = find_model(str(tiny_model("llama"))).architecture
    rows = [{"tokens": 2, "finish": "stop"}, {"tokens": 4, "finish": "length"}]
    found = answer_costs(arch, [[1, 2, 3], [4]], rows)
    flops = inference_flops(arch, 5 + 4, output_tokens=3 + 4, lengths=[5, 4])
    assert found == {"prompt_tokens": 4, "new_tokens": 7, "flops": flops}
    assert eval_numbers({"base": found, "tell": found}) == {"flops": 2 * flops, "arms": {"base": found, "tell": found}}
