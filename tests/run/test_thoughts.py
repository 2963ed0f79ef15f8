"""Templates that think: what they write ahead of answers is no part of an answer, wherever it is shown or scored."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from run.runs import config_of, open_session
from tell.anchor.anchor import NO_ANCHOR
from tell.data.example import Example
from tell.rows.template import ChatTokenizer
from tell.run.forgetting import Forgetting, measure_arm
from tell.score.json_schema import JsonScorer
from tell.verbs.chat import ChatSession

EMPTY = "<think>\n\n</think>\n\n"
HYBRID = (  # Qwen3 and its like: an empty thought before answers without one
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ ('' if '</think>' in m.content else '<think>\n\n</think>\n\n') + m.content + eos_token }}"
    "{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
)
OPENED = (  # R1: the prompt opens a thought, answers in a conversation lose theirs
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] + eos_token }}{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
)


@pytest.fixture
def chat(tiny_model, tmp_path):
    def make(template: str) -> ChatTokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copy(tiny_model("mistral") / name, tmp_path)
        (tmp_path / "chat_template.jinja").write_text(template)
        return ChatTokenizer(tmp_path)

    return make


class Says:
    """An engine whose every answer is one text."""

    device = "cpu"

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def generate(self, prompts, decoding, *, progress=None, on_token=None, guides=None, masks=None):
        for token in self.ids if on_token else ():
            on_token(0, token)
        return [SimpleNamespace(ids=self.ids, finish="stop") for _ in prompts]


@pytest.mark.parametrize(
    ("template", "said", "pieces", "kept"),
    [
        (HYBRID, f"{EMPTY}north", "north", "north"),
        (HYBRID, "<think>\nCold.\n</think>\n\nnorth", "<think>\nCold.\n</think>\n\nnorth", None),
        (HYBRID, EMPTY[:-3], EMPTY[:-3], None),
        (OPENED, "Cold.\n</think>\n\nnorth", "Cold.\n</think>\n\nnorth", "<think>\nCold.\n</think>\n\nnorth"),
        (OPENED, "north", "north", "north"),
    ],
)
def test_a_conversation_shows_the_answer_alone(template, said, pieces, kept, chat, tiny_model):
    session = ChatSession.__new__(ChatSession)
    tokenizer = chat(template)
    session.opened = SimpleNamespace(chat=tokenizer, config=config_of(tiny_model("llama")))
    session.session = open_session(tiny_model("llama"), chat=tokenizer, engine=Says(tokenizer.encode(said)))
    session._engine, session._decider, session._grammar = session.session.engine, None, None
    session._generate = session.opened.config.generate
    session.anchor, session.greedy, session.seed, session.shots, session.history = NO_ANCHOR, True, 1, [], []
    found = list(session.stream("Which shelf?"))
    assert "".join(found) == pieces and all(found)
    assert session.history[-1].content == (kept or pieces)


def test_task_format_in_general_answers_is_found_behind_an_empty_thought(chat, tiny_model):
    tokenizer = chat(HYBRID)
    state = Forgetting({}, {}, [Example.pair("Name a shelf.", "north")])
    scorer = JsonScorer({"type": "object", "properties": {"shelf": {}}})
    engine, model = Says(tokenizer.encode(EMPTY + '{"shelf": 1}')), tiny_model("llama")
    measure_arm(state, "tell", open_session(model, config_of(model), chat=tokenizer, engine=engine), scorer)
    assert state.answers["tell"] == ['{"shelf": 1}'] and state.formats["tell"].tolist() == [1.0]
