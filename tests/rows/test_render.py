"""Rows begin with the prompt of decoding, whatever the template does, or are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from tell.anchor.anchor import Anchor
from tell.data.example import Example, Message
from tell.errors import TellError
from tell.rows import render
from tell.rows.frame import Frames
from tell.rows.render import render_row
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, prompt_ids, tokenize

# Small templates with the habits of published ones; the tags are the tiny tokenizers'.
TEMPLATES = {
    # Mistral v0.3: the system text goes to the last user turn, if that is the last turn of all
    "mistral v3": (
        "{% set rule = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (rule + '\n\n' if loop.last and rule else '') + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
    ),
    # R1 distills: the thought is opened in the prompt alone, and taken out of answers
    "r1": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<bot>' + m.content.split('</think>')[-1] + eos_token }}{% elif m.role == 'user' %}"
        "{{ '<user>' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<bot><think>\n' }}{% endif %}"
    ),
    # ChatML over a tokenizer that has none of its tokens
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # DeepSeek V3.1: a closed thought in the prompt, or an open one where the switch is on
    "v3.1": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<bot></think>' + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ '<user>' + m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<bot>' }}"
        "{{ '<think>' if thinking else '</think>' }}{% endif %}"
    ),
    # Qwen3 and its like: an empty thought before answers without one; in the prompt where the switch is off
    "hybrid": (
        "{% set empty = '<think>\n\n</think>\n\n' %}{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ '<bot>' + ('' if '</think>' in m.content else empty) + m.content }}"
        "{{ eos_token }}{% else %}"
        "{{ '<user>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<bot>' + ('' if enable_thinking else empty) }}{% endif %}"
    ),
}
LLAMA31 = (  # a date, a system turn in any case, contents trimmed
    "{% set date = strftime_now('%d %b %Y') %}{% set first = messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\nToday: ' + date + '\n' + (messages[0].content | trim if first else '') + '<|im_end|>' }}"
    "{% for m in messages %}{% if not (loop.first and first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", "Which shelf?"), Message("assistant", "north")
THOUGHT = Message("assistant", "<think>\nIt is cold.\n</think>\n\nnorth")


@pytest.fixture(scope="module")
def chat(tiny_model, tmp_path_factory):
    def make(template: str, family: str = "mistral") -> ChatTokenizer:
        folder = tmp_path_factory.mktemp("m")
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copy(tiny_model(family) / name, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATES.get(template, template))
        return ChatTokenizer(folder)

    return make


def written(tokenizer: ChatTokenizer, *messages: Message, **options) -> str:
    """What a row trains, once the row is held against its decoding prompt."""
    example = Example.of(messages, source="task", origin="t:1")
    table = tokenize([example], tokenizer, source="task", **options)
    ids, mask = (part.tolist() for part in table.row(0))
    prompt = prompt_ids(tokenizer, example, options.get("anchor", Anchor("")))
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt)] and not mask[len(prompt) - 1]
    last = max(i for i, trained in enumerate(mask) if trained)
    assert ids[last] in tokenizer.stop_ids
    return tokenizer.backend.decode(ids[len(prompt) : last + 1], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "expected"),
    [("mistral v3", " north</s>"), ("r1", "north</s>"), ("chatml", "north</s>"), ("v3.1", "north</s>")],
)
@pytest.mark.parametrize("anchored", [False, True])
def test_rows_begin_with_the_prompt(template, expected, anchored, chat):
    tokenizer = chat(template)
    options = {"anchor": Anchor("Sort.", "system")} if anchored else {}
    assert written(tokenizer, USER, ANSWER, **options) == expected
    assert written(tokenizer, SYSTEM, USER, ANSWER, **options) == expected
    assert written(tokenizer, SYSTEM, USER, Message("assistant", "no"), USER, ANSWER, **options) == expected


def test_many_rows_are_as_one(chat):
    tokenizer = chat("mistral v3")
    example = Example.of((SYSTEM, USER, ANSWER), source="task", origin="t:1")
    alone, many = (tokenize([example] * n, tokenizer, source="task") for n in (1, 300))
    assert many.row(299)[0].tolist() == alone.row(0)[0].tolist()
    assert "Be brief." in tokenizer.decode(many.row(299)[0])


def test_a_template_with_a_date(chat):
    tokenizer = chat(LLAMA31, "llama")
    assert written(tokenizer, USER, Message("assistant", " north\n")) == "north<|im_end|>"
    assert written(tokenizer, SYSTEM, USER, ANSWER) == "north<|im_end|>"


def test_a_greeting_is_context(chat):
    hello = Message("assistant", "Hello!")
    tokenizer = chat(LLAMA31, "llama")
    assert written(tokenizer, hello, USER, ANSWER) == "north<|im_end|>"
    table = tokenize([Example.of((hello, USER, ANSWER), source="task", origin="t:1")], tokenizer, source="task")
    assert "Hello" not in tokenizer.decode(table.row(0)[0][table.row(0)[1]]) and not table.notices


def test_a_template_that_opens_a_thought_keeps_the_row_s_own(chat):
    assert written(chat("r1"), USER, THOUGHT) == "It is cold.\n</think>\n\nnorth</s>"


def test_answers_are_shown_with_the_thought_that_the_prompt_opened(chat):
    ids = chat("r1").encode("It is cold.\n</think>\n\nnorth")
    assert chat("r1").answer(ids) == THOUGHT.content
    assert chat("r1").answer(chat("r1").encode("north")) == "north"
    assert chat("v3.1").answer(ids) == "It is cold.\n</think>\n\nnorth"


def test_an_empty_thought_that_the_template_writes_is_no_part_of_the_answer(chat):
    thinking = chat("hybrid").thoughtful()
    assert written(thinking, USER, ANSWER) == "<think>\n\n</think>\n\nnorth</s>"
    assert thinking.answer(thinking.encode("<think>\n\n</think>\n\nnorth")) == "north"
    assert thinking.answer(thinking.encode(THOUGHT.content)) == THOUGHT.content
    assert written(chat("hybrid"), USER, ANSWER) == "north</s>"


@pytest.mark.parametrize("template", ["v3.1", "hybrid", None])
def test_a_template_with_a_switch_for_thoughts(template, chat, tiny_model):
    tokenizer = chat(template) if template else ChatTokenizer(tiny_model("qwen3"))
    with pytest.raises(TellError, match=r"t:1: the chat template of \w+ closes the thought .* so that the run thinks"):
        written(tokenizer, USER, THOUGHT)
    thinking = tokenizer.thoughtful()
    assert thinking.thinking and not tokenizer.thinking and thinking.fingerprint != tokenizer.fingerprint
    text = written(thinking, USER, THOUGHT)
    assert "It is cold.\n</think>\n\nnorth" in text
    assert "north" in written(thinking, USER, ANSWER)


def test_a_template_without_a_switch_stays_as_it_is(chat):
    tokenizer = chat("r1")
    assert tokenizer.thoughtful() is tokenizer


def test_earlier_answers_that_decoding_would_write_otherwise_are_context(tiny_model):
    tokenizer = ChatTokenizer(tiny_model("qwen3"))
    example = Example.of((USER, ANSWER, USER, ANSWER), source="task", origin="t:1")
    table = tokenize([example] * 2, tokenizer, source="task")
    assert table.notices == [
        "task: 2 earlier answers of 2 rows are context without loss, since the chat template of qwen3 shows them "
        "differently from how decoding writes them; to train one, give it a row"
    ]
    _, mask = table.row(0)
    assert mask[: len(prompt_ids(tokenizer, example))].sum() == 0


def test_more_answers_than_can_be_looked_at_are_refused(chat, monkeypatch, tiny_model):
    turns = [USER, ANSWER] * 4
    framed = ChatTokenizer(tiny_model("llama"))
    assert Frames(framed).of(turns) is not None
    spans = render_row(chat("chatml"), turns).spans
    assert len(spans) == 4
    monkeypatch.setattr(render, "MOST_TURNS", 8)  # 1 + 3 + 5 are asked for
    example = Example.of(turns, source="task", origin="f.jsonl:7")
    with pytest.raises(TellError, match=r"f.jsonl:7: has 4 answers to train in 8 turns; .* 9 turns .* more than 8\. S"):
        tokenize([example], chat("chatml"), source="task")
    general = tokenize([example] * 300, chat("chatml"), source="general", rules=RowRules(misfit="drop"))
    assert [row.origin for row in general.dropped] == ["f.jsonl:7"] * 300  # enough for frames
    assert Frames(framed).of(turns) is None
    few = [USER, replace(ANSWER, trained=False), *turns[2:]]
    assert render_row(chat("chatml"), few).spans == spans[1:]


def test_a_template_that_loses_the_system_text_is_refused(chat):
    tokenizer = chat(TEMPLATES["r1"].replace("{% else %}{{ m.content }}", ""))
    with pytest.raises(TellError, match=r"t:1: the chat template of mistral leaves out or changes the system text"):
        written(tokenizer, SYSTEM, USER, ANSWER)


def test_an_end_that_no_token_stands_for_is_refused(chat, tiny_model):
    tokenizer = chat("chatml")
    path = tokenizer.folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<end>"}))
    (tokenizer.folder / "config.json").write_text('{"eos_token_id": 4000}')  # neither is in the vocabulary
    with pytest.raises(TellError, match=r"t:1: decoding of .* does not stop at '<end>'.*Set eos_token"):
        written(ChatTokenizer(tokenizer.folder), USER, ANSWER)


def test_rows_that_do_not_fit_are_dropped_where_the_rules_say_so(tiny_model):
    """One general row with a system turn, which Gemma 2 refuses; one that holds an end token."""
    tokenizer = ChatTokenizer(tiny_model("gemma2"))
    ended = Message("assistant", "no<end_of_turn>rth")
    examples = [
        Example.of(turns, source="general", origin=f"g:{i}")
        for i, turns in enumerate([(USER, ANSWER), (SYSTEM, USER, ANSWER), (USER, ended)])
    ]
    table = tokenize(examples, tokenizer, source="general", rules=RowRules(misfit="drop"))
    assert table.origins.tolist() == ["g:0"]
    reasons = {d.origin: d.reason for d in table.dropped}
    assert "gemma2 refuses the conversation (System role not supported)" in reasons["g:1"]
    assert reasons["g:2"] == "the answer holds <end_of_turn>, at which decoding of gemma2 stops"
    with pytest.raises(TellError, match="g:1"):
        tokenize(examples, tokenizer, source="general")


def test_tokens_without_an_embedding_are_refused(tiny_model):
    tokenizer = ChatTokenizer(tiny_model("llama"))
    example = Example.of((USER, ANSWER), source="task", origin="t:1")
    largest = int(max(tokenize([example], tokenizer, source="task").ids))
    assert len(tokenize([example], tokenizer, source="task", rules=RowRules(vocab=largest + 1))) == 1
    with pytest.raises(TellError, match=rf"t:1: .* is token {largest} of .*, and the embedding of llama has"):
        tokenize([example], tokenizer, source="task", rules=RowRules(vocab=largest))
