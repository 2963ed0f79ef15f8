"""`tell serve --gguf`: a GGUF file through llama.cpp, asked by the real openai client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from exports.gguf_files import gguf_of
from serve.serving import running_answers
from tell.errors import TellError
from tell.serve.gguf_answers import GgufAnswers

TURNS = [{"role": "user", "content": "My tent arrived with a broken pole."}]


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
        match=r"the prompt has [\d,]+ tokens and the request asks for 20 more, and the model takes 1,024",
    ):
        ask(server, messages=[{"role": "user", "content": "word " * 3000}])
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'"):
        ask(server, model="x")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    # an untrained model may write white space, which llama.cpp's grammar allows, up to the limit
    assert ask(server, response_format=wanted, max_tokens=60).choices[0].message.content.startswith("{")
    assert not ask(server).choices[0].message.content.startswith("{")
    with pytest.raises(TellError, match="is not a GGUF file"):
        (tmp_path / "x.gguf").write_bytes(b"no")
        GgufAnswers(tmp_path / "x.gguf")
