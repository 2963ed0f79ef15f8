"""llama.cpp renders the prelude as the run does, and answers as asked."""

from __future__ import annotations

import json
import threading

import pytest

from exports.gguf_files import QWEN3_THINKS, gguf_of, with_template
from rows.test_prelude import ANCHORS, CONVERSATIONS, INDENTED, LLAMA3, TEMPLATES, WORDS, conversation, takes_system
from tell.anchor.anchor import Anchor
from tell.config_sections import GenerateConfig
from tell.data.example import Message
from tell.errors import TellError
from tell.exports.llama_cpp import LlamaCpp, Wanted
from tell.exports.to_gguf import _KEPT
from tell.rows.prelude import with_anchor
from tell.rows.template import DEFAULT_TEMPLATE, ChatTokenizer

GREEDY = GenerateConfig(greedy=True, repetition_penalty=1.0)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def file(tiny_model, tmp_path_factory):
    return gguf_of(tiny_model("llama"), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def chat(tiny_model):
    return ChatTokenizer(tiny_model("llama"))


@pytest.fixture(scope="module")
def model(file):
    held = LlamaCpp(file, rows=2)
    yield held
    held.close()


def rendering(chat: ChatTokenizer, template: str, tmp_path) -> ChatTokenizer:
    """The tokenizer with another template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((chat.folder / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes(template.encode())
    return ChatTokenizer(tmp_path)


@pytest.mark.parametrize("name", TEMPLATES)
def test_token_ids_are_those_of_the_run(name, file, chat, tmp_path):
    other = rendering(chat, TEMPLATES[name] or DEFAULT_TEMPLATE.replace("begins", "false"), tmp_path)
    for number, anchor in enumerate(ANCHORS):
        if anchor.place == "system" and not takes_system(name):
            continue
        template = _KEPT + "\n" + with_anchor(other.template, anchor, special=other.special, force_thinking=True)
        model = LlamaCpp(with_template(file, template, tmp_path / f"{number}.gguf"))
        assert model.template.rstrip() == template.rstrip()
        for turns in CONVERSATIONS:
            if turns[0].role == "system" and not takes_system(name):
                continue
            given = [m.to_dict() for m in turns]
            ids = other.encode(other.render(anchor.apply(turns), add_generation_prompt=True))
            assert model.prompt_ids(given) == ids
            assert model.prompt_ids([m.to_dict() for m in anchor.apply(turns)]) == ids  # it is there already
            parts = [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in turns]
            assert model.prompt_ids(parts) == ids
            bare = other.encode(other.render(turns, add_generation_prompt=True))
            assert model.prompt_ids(given, {"tell_anchor": False}) == bare != ids
        model.close()


def test_only_whole_words_head_a_text(file, chat, tmp_path):
    anchor = Anchor("Answer")
    model = LlamaCpp(with_template(file, with_anchor(chat.template, anchor), tmp_path / "words.gguf"))
    for text in WORDS:
        turns = [Message("user", text)]
        ids = chat.encode(chat.render(anchor.apply(turns), add_generation_prompt=True))
        assert model.prompt_ids([m.to_dict() for m in turns]) == ids, text
    model.close()


def test_an_exported_model_tuned_and_exported_again(file, chat, tmp_path):
    old, new = ANCHORS[1], Anchor("Answer.")
    first = with_anchor(chat.template, old, shots={None: conversation("u old", "a older")}, special=chat.special)
    made = with_anchor(first, new, special=chat.special, force_thinking=True)
    model = LlamaCpp(with_template(file, made, tmp_path / "again.gguf"))
    turns = conversation("s Talk.", "u Where is my parcel?")
    given = [m.to_dict() for m in turns]
    assert model.prompt_ids(given) == chat.encode(chat.render(new.apply(turns), add_generation_prompt=True))
    bare = chat.encode(chat.render(turns, add_generation_prompt=True))
    assert model.prompt_ids(given, {"tell_anchor": False}) == bare
    model.close()


@pytest.mark.parametrize(
    "template", ["  {% for m in messages %}x{{ m.content }}{% endfor %}", "\n a\n{{ 1 }}", INDENTED, LLAMA3]
)
def test_a_template_that_needs_nothing_is_kept_too(template, file, chat, tmp_path):
    """Its head of white space survives the comment that keeps Ollama from replacing it."""
    other = rendering(chat, template, tmp_path)
    turns = conversation("u hi")
    made = _KEPT + "\n" + with_anchor(template, special=other.special, force_thinking=True)
    assert len(_KEPT) >= 100  # Ollama replaces templates that differ by less
    model = LlamaCpp(with_template(file, made, tmp_path / "kept.gguf"))
    assert model.prompt_ids([m.to_dict() for m in turns]) == other.encode(
        other.render(turns, add_generation_prompt=True)
    )
    model.close()


def test_llama_cpp_would_think(file, chat, tmp_path):
    """Why the prelude forces the switch: llama.cpp turns it on by itself where the template knows thoughts."""
    other, turns = rendering(chat, QWEN3_THINKS, tmp_path), conversation("u hi")
    closed = other.encode(other.render(turns, add_generation_prompt=True))
    given = [m.to_dict() for m in turns]
    for force in (False, True):
        made = with_anchor(QWEN3_THINKS, force_thinking=force)
        model = LlamaCpp(with_template(file, made, tmp_path / f"{force}.gguf"))
        assert (model.prompt_ids(given) == closed) is force
        model.close()
    open_ = other.thoughtful()
    thinking = with_anchor(QWEN3_THINKS, thinking=True, force_thinking=True)
    model = LlamaCpp(with_template(file, thinking, tmp_path / "on.gguf"))
    assert model.prompt_ids(given) == open_.encode(open_.render(turns, add_generation_prompt=True)) != closed
    model.close()


@pytest.mark.parametrize(
    "text", ["a  b\n\n c\t", "ünï 漢字 🙂", "<|im_end|>x", "1234567 it's we'll 'S", " " * 9, "a\r\nb"]
)
def test_the_tokenizer_is_the_models(text, model, chat):
    turns = [Message("user", text)]
    assert model.prompt_ids([turns[0].to_dict()]) == chat.encode(chat.render(turns, add_generation_prompt=True))


def test_answers(model):
    ids = model.prompt_ids(HELLO)
    said = model.answer(ids, GREEDY, Wanted(12))
    assert (said.finish, said.tokens) == ("length", 12) and said == model.answer(ids, GREEDY, Wanted(12))
    pieces: list[str] = []
    assert model.answer(ids, GREEDY, Wanted(12), pieces.append) == said
    assert "".join(pieces) == said.text and len(pieces) > 1
    warm = GenerateConfig(temperature=2.0, top_k=0, top_p=1.0)
    drawn = {model.answer(ids, warm, Wanted(8, seed=seed)).text for seed in (1, 2, 1, 2, 3)}
    assert len(drawn) == 3  # the same seed, the same answer
    assert model.answer(ids, GREEDY.model_copy(update={"repetition_penalty": 5.0}), Wanted(12)).text != said.text


def test_a_stop_text_ends_the_answer(model):
    ids = model.prompt_ids(HELLO)
    whole = model.answer(ids, GREEDY, Wanted(20)).text
    stop = whole[6:8]
    said = model.answer(ids, GREEDY, Wanted(20, stop=(stop,)))
    assert said.finish == "stop" and said.text == whole[: whole.index(stop)]


def test_a_reader_that_leaves_ends_the_answer(model):
    ids = model.prompt_ids(HELLO)
    heard: list[str] = []
    said = model.answer(ids, GREEDY, Wanted(200), lambda piece: heard.append(piece) or len(heard) == 3)
    assert said.finish == "left" and len(heard) == 3
    with pytest.raises(RuntimeError, match="gone"):
        model.answer(ids, GREEDY, Wanted(200), lambda piece: (_ for _ in ()).throw(RuntimeError("gone")))
    assert model.answer(ids, GREEDY, Wanted(3)).tokens == 3


def test_several_readers_at_once(model):
    ids = [model.prompt_ids([{"role": "user", "content": f"Number {i}"}]) for i in range(5)]
    alone = [model.answer(prompt, GREEDY, Wanted(10)).text for prompt in ids]
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.update({i: model.answer(ids[i], GREEDY, Wanted(10)).text}))
        for i in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(5)] == alone


def test_an_answer_obeys_its_schema(model):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["billing", "other"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    said = model.answer(model.prompt_ids(HELLO), GREEDY, Wanted(200, schema=schema))
    if said.finish == "stop":  # a random model may write white space to the limit
        assert json.loads(said.text)["kind"] in ("billing", "other")
    assert said.text.startswith("{")
    with pytest.raises(TellError, match="not a valid JSON Schema"):
        model.answer(model.prompt_ids(HELLO), GREEDY, Wanted(20, schema={"type": "thing"}))


def test_what_does_not_fit_names_both_numbers(model):
    assert model.context == 1024  # the tiny model's positions, not more
    with pytest.raises(TellError, match=r"1,024 tokens.*1,024"):
        model.answer([5] * 1024, GREEDY, Wanted(5))
    said = model.answer([5] * 1020, GREEDY, Wanted(50))
    assert said.tokens <= 4


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "user", "content": 5}], "content"),
        ([{"role": "user"}], "content"),
    ],
)
def test_messages_that_are_none(messages, why, model):
    with pytest.raises(TellError, match=why):
        model.prompt_ids(messages)


def test_a_template_that_refuses(file, tmp_path):
    made = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
        "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    )
    model = LlamaCpp(with_template(file, with_anchor(made, Anchor("Sort.")), tmp_path / "refuses.gguf"))
    with pytest.raises(TellError, match="refuses the request"):
        model.prompt_ids([*HELLO, {"role": "assistant", "content": "no"}, *HELLO])
    model.close()


def test_files_that_are_no_gguf(file, tmp_path):
    with pytest.raises(TellError, match="cannot be read"):
        LlamaCpp(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(TellError, match="not a GGUF file"):
        LlamaCpp(tmp_path / "text.gguf")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(TellError, match="cannot load"):
        LlamaCpp(tmp_path / "cut.gguf")


def test_other_processes_need_the_token(model):
    """The HTTP server inside xllamacpp answers nobody who does not know its token."""
    from http.client import HTTPConnection

    connection = HTTPConnection(*model._address, timeout=10)
    connection.request("POST", "/apply-template", json.dumps({"messages": HELLO}), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 401
    connection.close()
    assert model._address[0] == "127.0.0.1"


def test_its_loop_has_begun_when_it_is_opened(file, monkeypatch):
    """Else closing it at once may wait for ever, now and then."""
    told = {}
    ask = LlamaCpp._ask
    monkeypatch.setattr(LlamaCpp, "_ask", lambda self, path, body: told.setdefault(path, ask(self, path, body)))
    LlamaCpp(file, rows=3).close()
    assert len(told["/slots"]) == 3  # which the loop counts
