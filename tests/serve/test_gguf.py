"""`tell serve --gguf`: a GGUF file through llama.cpp, asked by the real openai client."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest

from exports.gguf_files import gguf_of, with_template
from serve.serving import running_answers
from tell.data.example import Message
from tell.errors import TellError
from tell.rows.prelude import with_anchor
from tell.rows.template import ChatTokenizer
from tell.serve.gguf_answers import GgufAnswers
from tell.verbs.open_run import open_run

ASKED = [Message("user", "My tent arrived with a broken pole.")]
TURNS = [turn.to_dict() for turn in ASKED]


@pytest.fixture(scope="module")
def file(tiny_model, tmp_path_factory):
    return gguf_of(tiny_model("llama"), tmp_path_factory.mktemp("gguf") / "tiny-f16.gguf")


@pytest.fixture(scope="module")
def server(file):
    with running_answers(GgufAnswers(file)) as made:
        yield made


def ask(server, **options):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    return client.chat.completions.create(**{"model": "tiny-f16", "messages": TURNS, "max_tokens": 20, **options})


def test_answers_streams_and_stops(server):
    whole = ask(server)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 20
    events = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.delta.content or "" for e in events for c in e.choices) == text
    assert events[-1].usage == whole.usage
    middle = text[len(text) // 2 :][:3]
    stopped = ask(server, stop=middle).choices[0]
    assert stopped.message.content == text[: text.index(middle)] and stopped.finish_reason == "stop"
    with ThreadPoolExecutor(8) as pool:
        each = list(pool.map(lambda _: ask(server).choices[0].message.content, range(8)))
    assert set(each) == {text}


def test_what_it_says_of_itself_and_refuses(server, tmp_path):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    (model,) = client.models.list()
    assert model.id == "tiny-f16" and not hasattr(model, "tell")  # no anchor in its template: `tell eval` sends it
    with pytest.raises(
        openai.BadRequestError,
        match=r"the prompt has [\d,]+ tokens, and the model takes 1,024",
    ):
        ask(server, messages=[{"role": "user", "content": "word " * 3000}])
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'"):
        ask(server, model="x")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    # an untrained model may write white space, which llama.cpp's grammar allows, up to the limit
    assert ask(server, response_format=wanted, max_tokens=60).choices[0].message.content.startswith("{")
    assert not ask(server).choices[0].message.content.startswith("{")
    unclear = {"properties": {"a": {"pattern": "(?=a)b"}}}
    for bad in ({"type": "foo"}, {"$ref": "#"}, unclear, {"uniqueItems": True, "x-guidance": {"lenient": True}}, True):
        with pytest.raises(openai.BadRequestError, match="response_format: ") as error:
            ask(server, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": bad}})
        assert error.value.param == "response_format"
    with pytest.raises(TellError, match="is not a GGUF file"):
        (tmp_path / "x.gguf").write_bytes(b"no")
        GgufAnswers(tmp_path / "x.gguf")


def test_the_run_says_the_limit_and_a_request_goes_without_anchor(file, tiny_model, runs, tmp_path):
    copy, template = tmp_path / "anchored.gguf", ChatTokenizer(tiny_model("llama")).template
    run = open_run(runs["support"])
    free = run.config.generate.model_copy(update={"max_new_tokens": None})
    run = replace(run, config=run.config.model_copy(update={"generate": free}))
    with running_answers(GgufAnswers(with_template(file, with_anchor(template, run.anchor), copy), run)) as server:
        own = run.folder.read(run.folder.findings)["answer_limit"]
        assert server.answerer.limit == own != 512
        bare = {"chat_template_kwargs": {"tell_anchor": False}}
        tokens = [ask(server, model="anchored", extra_body=more).usage.prompt_tokens for more in ({}, bare)]
        anchored, plain = (
            run.chat.encode(run.chat.render(turns, add_generation_prompt=True))
            for turns in (run.anchor.apply(ASKED), ASKED)
        )
        assert tokens == [len(anchored), len(plain)] and len(anchored) > len(plain)
        cut = ask(server, model="anchored", max_tokens=5000)  # more than there is room for
        assert cut.usage.total_tokens <= 1024
        with pytest.raises(
            openai.BadRequestError, match=r"chat_template_kwargs\.enable_thinking: this server does not"
        ):
            ask(server, model="anchored", extra_body={"chat_template_kwargs": {"enable_thinking": True}})


def test_a_signal_may_close_while_its_own_thread_holds_the_lock(file):
    answers, closed = GgufAnswers(file), threading.Event()

    def signalled() -> None:
        with answers._lock:
            answers.close(closed.set)

    thread = threading.Thread(target=signalled, daemon=True)
    thread.start()
    thread.join(10)
    assert closed.is_set()
    answers.free()
