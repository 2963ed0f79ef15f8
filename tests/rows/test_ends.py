"""End tokens written into answers are removed."""

from __future__ import annotations

from tell.data.example import Example, Message
from tell.rows.ends import foreign_end, without_ends
from tell.rows.template import ChatTokenizer


def test_end_tokens_behind_answers_are_taken_off(tiny_model):
    chat = ChatTokenizer(tiny_model("gemma2"))
    asked = Message("user", "What ends a turn?<eos>")
    texts = ["spam<eos>", "ham<end_of_turn>\n<eos> ", "<eos> is the end token", "spam ", "<|im_end|>"]
    examples = [Example.of((asked, Message("assistant", text)), source="task", origin=f"t:{text}") for text in texts]
    cleaned, changed = without_ends(examples, chat)
    assert changed == 2
    assert [example.answer for example in cleaned] == ["spam", "ham", *texts[2:]]
    assert [example.origin for example in cleaned] == [example.origin for example in examples]
    assert all(example.messages[0] == asked for example in cleaned)
    assert cleaned[0].hash == Example.of((asked, Message("assistant", "spam")), source="task", origin="").hash
    assert cleaned[2:] == examples[2:]


def test_the_end_token_of_another_model_is_seen():
    answers = [Example.pair("a", f"{text}</s>") for text in ("x", "y")]
    assert foreign_end(answers) == "</s>"
    assert foreign_end([*answers, Example.pair("a", "z")]) is None and foreign_end([]) is None
