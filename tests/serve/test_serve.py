"""`tell serve`, asked by the real openai client: the answers are those of `tell chat` and `tell eval`."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import jsonschema
import openai
import pytest
import yaml

import tell
from serve.serving import PATIENCE, command, copied, running, until
from tell.data.example import Example, Message
from tell.errors import TellError
from tell.files import read_jsonl
from tell.progress import Silent
from tell.run.answers import Prompting
from tell.serve import decode_thread
from tell.serve.chat_request import MOST_BODY, ChatRequest
from tell.serve.decode_thread import DecodeThread, Job
from tell.serve.reply import Reply
from tell.serve.run_server import bind, is_local
from tell.serve.served_models import open_models

TEXT = "My tent arrived with a broken pole, order 48213."
LONG = {"max_tokens": 900, "temperature": 0}


def client_of(server, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **options)


def ask(client, model: str, text: str = TEXT, **options):
    turns = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=turns, **options)


def answer(client, model: str, text: str = TEXT, **options) -> str:
    return ask(client, model, text, **options).choices[0].message.content


def chatted(run, arm: str, text: str = TEXT, **options) -> str:
    session = tell.chat(run, arm=arm, **options)
    try:
        return "".join(session.stream(text))
    finally:
        session.close()


@pytest.mark.parametrize("name", ["support", "reviews"])
def test_answers_are_those_of_tell_eval(name, runs, server):
    client = client_of(server)
    for arm in ("base", "tell", "tell-free"):
        rows = read_jsonl(runs[name] / f"predictions/{arm}.jsonl")
        found = [ask(client, f"{name}/{arm}", row["prompt"]) for row in rows]
        assert [f.choices[0].message.content for f in found] == [row["answer"] for row in rows]
        assert [f.choices[0].finish_reason for f in found] == [row["finish"] for row in rows]
        assert [f.usage.completion_tokens for f in found] == [row["tokens"] for row in rows]
    assert [answer(client, name, row["prompt"]) for row in read_jsonl(runs[name] / "predictions/tell.jsonl")] == [
        row["answer"] for row in read_jsonl(runs[name] / "predictions/tell.jsonl")
    ]


def test_answers_are_those_of_tell_chat(runs, server):
    client = client_of(server)
    assert answer(client, "support") == chatted(runs["support"], "tell")
    sampled = {"temperature": 0.3, "seed": 11}
    assert answer(client, "support/tell-free", **sampled) == chatted(runs["support"], "tell-free", seed=11)
    others = {answer(client, "support/tell-free", temperature=2, seed=seed) for seed in range(4)}
    assert len(others) > 1
    session = tell.chat(runs["support"], arm="tell-free")
    first = "".join(session.stream(TEXT))
    second = "".join(session.stream("And the lamp?"))
    session.close()
    turns = [
        {"role": "user", "content": TEXT},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "text", "text": "And the lamp?"}]},
    ]
    found = client.chat.completions.create(model="support/tell-free", messages=turns)
    assert found.choices[0].message.content == second


def test_a_stream_joins_to_the_answer(server):
    client = client_of(server)
    for model in ("support", "support/tell-free", "reviews"):
        whole = ask(client, model)
        events = list(ask(client, model, stream=True, stream_options={"include_usage": True}))
        pieces = [c.delta.content or "" for event in events for c in event.choices]
        assert "".join(pieces) == whole.choices[0].message.content
        assert [c.finish_reason for event in events for c in event.choices][-1] == whole.choices[0].finish_reason
        assert events[-1].usage == whole.usage and not events[-1].choices
        assert len({event.id for event in events}) == 1


def test_stop_texts(server):
    client = client_of(server)
    whole = answer(client, "support/tell-free", **LONG)
    middle = whole[len(whole) // 2 :][:7]
    for stop in (middle, [middle, "never written"]):
        found = ask(client, "support/tell-free", stop=stop, **LONG).choices[0]
        assert found.message.content == whole[: whole.index(middle)] and found.finish_reason == "stop"
        events = ask(client, "support/tell-free", stop=stop, stream=True, **LONG)
        assert "".join(e.choices[0].delta.content or "" for e in events) == whole[: whole.index(middle)]
    cut = ask(client, "support/tell-free", max_completion_tokens=3, temperature=0)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3


SCHEMA = {
    "type": "object",
    "properties": {"urgent": {"type": "boolean"}, "colour": {"enum": ["red", "dark green"]}, "n": {"enum": [1, 12, 3]}},
    "required": ["urgent", "colour", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("model", ["support", "reviews", "support/tell-free", "base", "support/base+schema"])
def test_a_schema_is_followed(model, server):
    """By arms that decide fields too; streamed or not; and next to requests without one."""
    client = client_of(server)
    wanted = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": SCHEMA, "strict": True}}
    found = ask(client, model, response_format=wanted, max_tokens=200).choices[0]
    jsonschema.validate(json.loads(found.message.content), SCHEMA)
    assert found.finish_reason == "stop"
    events = ask(client, model, response_format=wanted, max_tokens=200, stream=True)
    assert "".join(e.choices[0].delta.content or "" for e in events) == found.message.content
    with ThreadPoolExecutor(6) as pool:
        each = [
            pool.submit(answer, client, model, TEXT, **({"response_format": wanted} if i % 2 else {})) for i in range(6)
        ]
    assert {each[i].result() for i in (1, 3, 5)} == {answer(client, model, response_format=wanted)}
    assert {each[i].result() for i in (0, 2, 4)} == {answer(client, model)}


def test_objects_labels_and_the_runs_own_schema(runs, server):
    client = client_of(server)
    small = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    text = answer(
        client, "base", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": small}}
    )
    assert json.loads(text)["a"] in (1, 2)
    begun = answer(client, "base", response_format={"type": "json_object"})
    assert begun.startswith("{")
    assert answer(client, "base", response_format={"type": "text"}) == answer(client, "base")
    labels = set(json.loads((runs["reviews"] / "findings.json").read_text())["kind"]["labels"])
    assert answer(client, "reviews/base+schema") in labels
    session = tell.chat(runs["support"], arm="tell+schema")
    assert answer(client, "support/tell+schema", max_tokens=40) == "".join(session.stream(TEXT))
    session.close()
    bad = {"type": "string", "pattern": "(?=a)b"}
    for schema, why in ((bad, "a grammar cannot follow"), ({"$ref": "http://x/y"}, "response_format: ")):
        with pytest.raises(openai.BadRequestError, match=why) as error:
            ask(client, "base", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        assert error.value.param == "response_format"


def test_models_and_health(runs, server):
    client = client_of(server)
    found = {model.id: model for model in client.models.list()}
    assert {"support", "reviews", "base", "support/base", "reviews/tell-free", "support/tell-anchor"} <= set(found)
    assert not any("icl" in name for name in found)
    assert all(model.owned_by == "tell" for model in found.values())
    assert client.models.retrieve("support/tell-free").tell == {
        "run": "support",
        "arm": "tell-free",
        "anchor": True,
        "decides": False,
    }
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_fifty_clients_at_once(server):
    """Several models, streamed and not, free and decided: every answer is that of the prompt asked alone."""
    names = ("support", "support/tell-free", "reviews", "base", "reviews/tell-free")
    asked = [(names[i % 5], f"Order {i} is late by {i % 7} days.", bool(i % 3)) for i in range(50)]
    client = client_of(server)
    expected = [answer(client, name, text) for name, text, _ in asked]

    async def one(shared, name, text, stream):
        found = await ask(shared, name, text, stream=stream)
        if not stream:
            return found.choices[0].message.content
        return "".join([event.choices[0].delta.content or "" async for event in found])

    async def every():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as shared:
            return await asyncio.gather(*(one(shared, *request) for request in asked))

    assert asyncio.run(every()) == expected


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_row(stream, server, monkeypatch):
    body = {"model": "base", "messages": [{"role": "user", "content": TEXT}], "stream": stream, **LONG}
    whole = len(server_tokens(server, body))
    assert whole > 400  # the tiny model goes on and on
    begun, left = threading.Event(), threading.Event()

    def token(reply, found: int) -> bool:
        """`Reply.token` of a decoder that goes on when the client has left, and lets the server look at each token."""
        begun.set()  # a client that leaves before has no row
        assert left.wait(PATIENCE)
        reply.put(found)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), reply._loop).result(PATIENCE)
        return reply.gone

    monkeypatch.setattr(Reply, "token", token)
    with httpx.Client(timeout=PATIENCE) as client:
        request = client.build_request("POST", f"{server.url}/v1/chat/completions", json=body)
        if stream:
            response = client.send(request, stream=True)
            next(response.iter_lines())
            assert begun.wait(PATIENCE)
            response.close()
        else:
            leaves_early(server, body, begun)
    left.set()
    until(lambda: len(server.replies) == 2 and server.replies[1].result)
    assert len(server.replies[1].result.ids) < whole


def server_tokens(server, body) -> list[int]:
    """Tokens of the whole answer."""
    httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE)
    return server.replies[-1].text.ids


def leaves_early(server, body, begun: threading.Event) -> None:
    """Sends a request and closes the connection as soon as it is being answered."""
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        assert begun.wait(PATIENCE)


def test_a_prompt_beyond_the_context(server):
    client = client_of(server)
    with pytest.raises(
        openai.BadRequestError, match=r"the prompt has [\d,]+ tokens, and the model takes 1,024"
    ) as error:
        ask(client, "support", "word " * 2000)
    assert error.value.code == "context_length_exceeded"
    cut = ask(client, "base", "word " * 100, max_tokens=5000, temperature=0)  # what there is room for
    assert cut.usage.total_tokens == 1024 and cut.choices[0].finish_reason == "length"
    assert answer(client, "support")


def test_a_prompt_is_that_of_tell_eval_and_bare_where_a_request_says_so(models, server):
    """With fixed examples that have a system text, which a request may lack."""
    brief = Message("system", "Be brief.")
    shot = Example.of([brief, Message("user", "Late?"), Message("assistant", "no")], source="task", origin="")
    model = replace(models["support"], shots=[shot])
    for system in ([], [brief], [Message("system", "Be kind.")]):
        turns = [*system, Message("user", TEXT)]
        example = Example.of([*turns, Message("assistant", "")], source="task", origin="")
        asked = {"model": "support", "messages": [turn.to_dict() for turn in turns]}
        prompting = Prompting(model.chat, model.anchor, [shot], examples=0, room=999, seed=1)
        assert [model.prepare(ChatRequest(**asked)).prompt] == prompting.prompts("tell", [example], [])[0]
        bare = model.prepare(ChatRequest(**asked, chat_template_kwargs={"tell_anchor": False})).prompt
        assert bare == model.chat.encode(model.chat.render(turns, add_generation_prompt=True))
    client = client_of(server)
    found = ask(client, "support/tell-free", extra_body={"chat_template_kwargs": {"tell_anchor": False}})
    assert found.usage.prompt_tokens < ask(client, "support/tell-free").usage.prompt_tokens


def test_the_limit_is_that_of_tell_eval(runs, tmp_path):
    run = copied(runs["reviews"], tmp_path / "free")
    config = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    config["generate"]["max_new_tokens"] = None
    (run / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    models = open_models([run], Silent())
    findings = json.loads((run / "findings.json").read_text(encoding="utf-8"))
    assert {name: model.limit for name, model in models.items() if name != "base"} == dict.fromkeys(
        models.keys() - {"base"}, findings["answer_limit"]
    )
    assert models["base"].limit == 512 != findings["answer_limit"]


BAD = {
    "no JSON": (b"{", "is not JSON"),
    "no object": (b"[]", "is not a JSON object"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "no messages": ({"model": "base"}, "messages: Field required"),
    "empty": ({"messages": []}, "messages: List should have at least 1"),
    "several": ({"n": 2}, "n: one answer is given"),
    "hot": ({"temperature": -1}, "temperature: Input should be greater"),
    "not a number": (b'{"model": "base", "messages": [{}], "temperature": NaN}', "temperature: Input should be"),
    "unknown": ({"best_of": 3}, "best_of: this server does not know it"),
    "tools": ({"tools": [{"type": "function"}]}, "tools: tools are not supported"),
    "log probabilities": ({"logprobs": True}, "logprobs: log probabilities are not given"),
    "stops": ({"stop": [""]}, "stop.0: String should have at least 1"),
    "role": ({"messages": [{"role": "king", "content": "x"}]}, "messages: the last has the role 'king'"),
    "assistant last": ({"messages": [{"role": "assistant", "content": "x"}]}, "let it be the user's or a tool's"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts that are not text"),
    "half a character": (b'{"model": "base", "messages": [{"role": "user", "content": "\\ud83d"}]}', "surrogate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case, server):
    sent, expected = BAD[case]
    good = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
    if isinstance(sent, dict):
        sent = json.dumps(sent if case == "no messages" else {**good, **sent}).encode()
    found = httpx.post(f"{server.url}/v1/chat/completions", content=sent, headers={"content-type": "application/json"})
    error = found.json()["error"]
    assert found.status_code == 400 and error["type"] == "invalid_request_error" and expected in error["message"]


def test_what_else_is_refused(server):
    url, good = f"{server.url}/v1/chat/completions", {"model": "x/y", "messages": [{"role": "user", "content": "x"}]}
    found = httpx.post(url, json=good)
    assert found.status_code == 404 and "'x/y'; the models are support, " in found.json()["error"]["message"]
    assert httpx.post(url, content=json.dumps(good), headers={"content-type": "text/plain"}).status_code == 415
    large = httpx.post(url, json={**good, "user": "x" * MOST_BODY})
    assert large.status_code == 413 and large.json()["error"]["message"].startswith("the body has more than")
    assert httpx.get(url).status_code == 405 and httpx.get(f"{server.url}/v1/nothing").status_code == 404
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[", ""):
        assert httpx.get(f"{server.url}/health", headers={"host": host}).status_code == 400
    for host in ("localhost", "127.0.0.1:1", "[::1]:8000"):
        assert httpx.get(f"{server.url}/health", headers={"host": host}).status_code == 200


def test_a_token_beyond_this_machine(models):
    with running(models, host="0.0.0.0", token="let me in") as server:
        assert httpx.get(f"{server.url}/health", headers={"host": "other"}).status_code == 200
        for headers in ({}, {"authorization": "Bearer let me"}, {"authorization": "let me in"}):
            found = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
        for host in ("x/health?", "x/health#"):  # of which older versions of starlette make the path
            assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 401
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="let me in")
        assert answer(client, "base", **{**LONG, "max_tokens": 2})
    assert [is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        True,
        True,
        True,
        False,
        False,
    ]


class Stub:
    """A client that leaves after some tokens, or when it is told to."""

    def __init__(self, most: int | None = None) -> None:
        self.most, self.gone, self.tokens, self.answer = most, False, [], None

    def token(self, token: int) -> bool:
        self.tokens.append(token)
        return len(self.tokens) == self.most

    def end(self, answer) -> None:
        self.answer = answer


def jobs_of(models, name: str, *clients: Stub) -> list[Job]:
    model = models[name]
    asked = ChatRequest(model=name, messages=[{"role": "user", "content": TEXT}], max_tokens=60, temperature=0)
    return [Job(model, model.prepare(asked), client) for client in clients]


def test_a_full_queue_and_a_failure(models, monkeypatch):
    """More than may wait are refused; a batch that fails is reported, and the next is answered."""
    monkeypatch.setattr(decode_thread, "MOST_WAITING", 2)
    thread = DecodeThread()
    gate = threading.Event()
    engine, serve = models["base"].engine, models["base"].engine.serve

    def held(*args, **options):
        gate.wait(PATIENCE)
        engine.__dict__.pop("serve")
        raise MemoryError("no room")

    engine.serve = held
    clients = [Stub(), Stub(), Stub(), Stub()]
    first, second, third, fourth = jobs_of(models, "base", *clients)
    thread.submit(first)
    thread.submit(second)
    with pytest.raises(Exception, match="2 requests wait already") as error:
        thread.submit(third)
    assert error.value.refusal.status == 429
    gate.set()
    until(lambda: clients[0].answer is not None)
    assert isinstance(clients[0].answer, MemoryError)
    until(lambda: thread._running == 0 and not thread._waiting)
    thread.submit(fourth)
    thread.close(lambda: None)
    with pytest.raises(Exception, match="the server is stopping") as error:
        thread.submit(third)
    assert error.value.refusal.status == 503
    thread.join()
    assert len(clients[3].answer.ids) == 60 and serve == engine.serve


def test_a_failure_leaves_answers_alone_and_lost_weights_end_the_thread(models):
    """What was answered before a batch fails stays so; where the weights cannot be restored, nobody waits for ever."""
    thread, gate, stopped = DecodeThread(), threading.Event(), threading.Event()
    engine, serve = models["base"].engine, models["base"].engine.serve
    short, long, other, late = Stub(most=1), Stub(), Stub(), Stub()
    first, second, late_job = jobs_of(models, "base", short, long, late)

    def held(requests, *args, **options):
        gate.wait(PATIENCE)
        engine.__dict__.pop("serve")
        thread._stack.callback(lambda: 1 / 0)
        serve(requests[:1], *args, **options)
        raise MemoryError("no room")

    engine.serve = held
    with thread._changed:  # both in one batch
        thread.submit(first)
        thread.submit(second)
    thread.submit(*jobs_of(models, "support/tell-free", other))
    gate.set()
    thread._thread.join(PATIENCE)
    assert not thread._thread.is_alive() and thread.stopping
    assert len(short.answer.ids) == 1
    assert isinstance(long.answer, MemoryError) and isinstance(other.answer, ZeroDivisionError)
    with pytest.raises(Exception, match="the server is stopping"):
        thread.submit(late_job)
    thread.close(stopped.set)
    assert stopped.is_set()


def test_what_cannot_join_a_batch_is_next(models):
    """A request that does not fit into the running batch is not passed by those that came after it."""
    thread, order = DecodeThread(), []
    engine, serve = models["base"].engine, models["base"].engine.serve
    clients = [Stub() for _ in range(4)]
    running, large, *small = jobs_of(models, "base", *clients)
    large = replace(large, prepared=replace(large.prepared, limit=61))

    def watched(requests, decoding, arrivals, **options):
        def asked(free, fits):
            if len(thread._waiting) + len(order) == 0:
                for job in (large, *small):
                    thread.submit(job)
            joined = arrivals(free, lambda request: fits(request) and request.limit <= 60)
            order.append([request.limit for request in joined])
            return joined

        order_of_batches.append([request.limit for request in requests])
        serve(requests, decoding, asked, **options)

    order_of_batches: list[list[int]] = []
    engine.serve = watched
    try:
        thread.submit(running)
        until(lambda: all(client.answer is not None for client in clients))
    finally:
        engine.__dict__.pop("serve")
    thread.close(lambda: None)
    thread.join()
    assert order_of_batches == [[60], [61, 60, 60]] and not any(order)


def test_who_left_while_waiting_is_not_answered(models):
    thread = DecodeThread()
    gone, stays, leaves = Stub(), Stub(), Stub(most=5)
    gone.gone = True
    for job in jobs_of(models, "support/tell-free", stays, gone, leaves):
        thread.submit(job)
    thread.close(lambda: None)
    thread.join()
    assert gone.answer is None and len(stays.answer.ids) == 60
    assert leaves.answer.ids == stays.answer.ids[:5] and leaves.answer.finish == "stop"


def test_a_signal_lets_answers_end(runs, home):
    with command(str(runs["support"])) as (process, url):
        body = {"model": "base", "messages": [{"role": "user", "content": TEXT}], "stream": True, "temperature": 0}
        body["max_tokens"] = 400
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            next(lines)
            process.terminate()
            late: list[int] = []
            until(lambda: refused(url, late))
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and len(rest) > 200, (len(rest), rest[-2:])
        process.join(PATIENCE)
        assert process.exitcode == 0
        assert set(late) <= {200, 503}, set(late)


def refused(url: str, seen: list[int]) -> bool:
    """Whether a new request is refused with 503, or the server has ended."""
    try:
        seen.append(httpx.get(f"{url}/health").status_code)
    except httpx.TransportError:
        return True
    return seen[-1] == 503


def test_what_cannot_be_served(runs, tiny_model, tmp_path):
    with pytest.raises(TellError, match="has the name support, as another model"):
        open_models([runs["support"], copied(runs["support"], tmp_path / "support")], Silent())
    other = copied(runs["support"], tmp_path / "other")
    config = (other / "run.yaml").read_text(encoding="utf-8")
    (other / "run.yaml").write_text(config.replace(str(tiny_model("llama")), str(tiny_model("qwen3"))))
    with pytest.raises(TellError, match=r"other: is a run over .*qwen3.*, and the first one over .*llama"):
        open_models([runs["reviews"], other], Silent())
    moved, base = copied(runs["support"], tmp_path / "moved"), copied(tiny_model("llama"), tmp_path / "base")
    (moved / "run.yaml").write_text(config.replace(str(tiny_model("llama")), str(base)))
    assert "moved" in open_models([runs["reviews"], moved], Silent())  # the same model in another folder
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-100_000::4] = bytes(byte ^ 1 for byte in data[-100_000::4])  # other weights, though hardly
    (base / "model.safetensors").write_bytes(data)
    with pytest.raises(TellError, match=r"moved: is a run over .*base .*, and the first one over .*llama"):
        open_models([runs["reviews"], moved], Silent())
    for verb in (lambda: open_models([moved], Silent()), lambda: tell.chat(moved), lambda: tell.evaluate(moved)):
        with pytest.raises(TellError, match="base: its weights changed since this run was trained"):
            verb()
    with bind("127.0.0.1", 0) as taken:
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # no answer waits for what came before it
        taken.listen()
        with pytest.raises(TellError, match=r"cannot listen at 127\.0\.0\.1 port"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(TellError, match="cannot listen at no such host port 80"):
        bind("no such host", 80)
