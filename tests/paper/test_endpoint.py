import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tell.errors import TellError
from tell.paper import Limits, OpenAITeacher, Prices, build_halu_cot_json
from tell.paper.halueval import HaluRow

from .server import completion, good, row_of, serve


def rows(n):
    labels = ["yes" if i % 3 == 0 else "no" for i in range(n)]
    return [HaluRow(f"{i}", f"question {i}", f"answer {i}", labels[i], (), f"f:{i + 1}") for i in range(n)]


def teacher(endpoint, **options):
    return OpenAITeacher(endpoint.url, "tiny", "secret-key", **options)


def error(message):
    return {"error": {"message": message, "type": "x", "param": None, "code": None}}


def test_each_row_gets_a_thought_and_tokens_are_counted(tmp_path):
    with serve() as endpoint:
        bought = teacher(endpoint, prices=Prices(2.0, 10.0))
        seen = []
        thoughts = bought.write(rows(10), cache=tmp_path / "c.jsonl", progress=lambda *at: seen.append(at))
    assert [t.text for t in thoughts] == [json.loads(good(r)[1])["thought"] for r in endpoint_order(endpoint, 10)]
    assert seen == [(i, 10) for i in range(11)]
    assert (bought.usage.answers, bought.usage.prompt_tokens, bought.usage.completion_tokens) == (10, 1000, 200)
    assert bought.usage.cost == pytest.approx((1000 * 2 + 200 * 10) / 1e6)
    assert bought.usage.line() == "10 answers, 1,000 tokens in, 200 tokens out, cost 0.0040"
    assert endpoint.keys == {"Bearer secret-key"}
    assert endpoint.requests[0]["response_format"] == {"type": "json_object"}
    assert "secret-key" not in (tmp_path / "c.jsonl").read_text()


def endpoint_order(endpoint, n):
    """The requests by row, whatever order they came in."""
    by_query = {row_of(request)["query"]: request for request in endpoint.requests}
    return [by_query[f"question {i}"] for i in range(n)]


def test_the_teacher_is_told_label_and_marked_passages(tmp_path):
    row = HaluRow("7", "Who wrote Faust?", "Schiller wrote it.", "yes", ("Schiller",), "f:1")
    with serve() as endpoint:
        teacher(endpoint).write([row], cache=tmp_path / "c.jsonl")
    assert row_of(endpoint.requests[0]) == {
        "query": "Who wrote Faust?",
        "response": "Schiller wrote it.",
        "label": "yes",
        "marked_passages": ["Schiller"],
    }


def test_no_more_requests_than_allowed_are_under_way(tmp_path):
    both = threading.Barrier(3)

    def answer(request):
        both.wait(timeout=30)  # passes only while three requests are under way at once
        return good(request)

    with serve(answer) as endpoint:
        teacher(endpoint, limits=Limits(concurrency=3)).write(rows(9), cache=tmp_path / "c.jsonl")
    assert endpoint.most_under_way == 3


def test_429_and_500_are_retried(tmp_path):
    failures = {"question 0": [429, 429], "question 1": [500, 503]}

    def answer(request):
        left = failures.get(row_of(request)["query"])
        return (left.pop(), error("slow down")) if left else good(request)

    with serve(answer) as endpoint:
        bought = teacher(endpoint)
        thoughts = bought.write(rows(3), cache=tmp_path / "c.jsonl")
    assert all(thought.text for thought in thoughts)
    assert Counter(endpoint.queries()) == {"question 0": 3, "question 1": 3, "question 2": 1}
    assert bought.usage.answers == 3


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("I cannot do that.", "is not JSON"),
        ('{"thought": "cut of', "is not JSON"),
        ('{"hallucination": "yes"}', "has no thought"),
        ('["yes"]', "has no thought"),
        ('{"thought": "Wrong.", "hallucination": "no"}', "has hallucination 'no', against the label"),
        (
            '{"thought": "All was checked. There is no hallucination.", "hallucination": "yes"}',
            "has a thought that concludes against the label",
        ),
    ],
)
def test_an_unusable_answer_is_asked_for_again_then_dropped_and_counted(tmp_path, bad, reason):
    def once(request):
        return good(request) if len(request["messages"]) > 2 else (200, bad)

    with serve(once) as endpoint:
        (thought,) = teacher(endpoint).write(rows(1), cache=tmp_path / "a.jsonl")
    assert thought.text and len(endpoint.requests) == 2
    repeated = endpoint.requests[1]["messages"]
    assert repeated[2] == {"role": "assistant", "content": bad}
    assert reason in repeated[3]["content"] and 'label is "yes"' in repeated[3]["content"]

    with serve(lambda request: (200, bad)) as endpoint:
        bought = teacher(endpoint, limits=Limits(attempts=2))
        (thought,) = bought.write(rows(1), cache=tmp_path / "b.jsonl")
    assert thought.text is None and thought.reason == f"2 answers, the last {reason}"
    assert len(endpoint.requests) == 2 and bought.usage.answers == 2


def test_fenced_json_is_read(tmp_path):
    with serve(lambda request: (200, f"```json\n{good(request)[1]}\n```")) as endpoint:
        (thought,) = teacher(endpoint).write(rows(1), cache=tmp_path / "c.jsonl")
    assert thought.text.endswith("This is a hallucination.")


def test_options_an_endpoint_refuses_are_left_out(tmp_path):
    def answer(request):
        if "response_format" in request:
            return 400, error("'response_format' is not supported")
        if "max_tokens" in request:
            return 400, error("'max_tokens' is not supported, use 'max_completion_tokens' instead")
        return good(request)

    with serve(answer) as endpoint:
        thoughts = teacher(endpoint, limits=Limits(concurrency=1)).write(rows(4), cache=tmp_path / "c.jsonl")
    assert all(thought.text for thought in thoughts)
    assert len(endpoint.requests) == 6  # the two refusals are learned from
    assert endpoint.requests[-1]["max_completion_tokens"] == 600


def test_a_limit_that_is_too_large_whatever_its_name_is_asked_twice_and_no_more(tmp_path):
    refusal = "'max_tokens' or 'max_completion_tokens' is too large: 600"
    with serve(lambda request: (400, error(refusal))) as endpoint:
        (thought,) = teacher(endpoint).write(rows(1), cache=tmp_path / "c.jsonl")
    assert thought.text is None and len(endpoint.requests) == 2


def test_a_row_the_endpoint_refuses_is_dropped_and_asked_again_next_time(tmp_path):
    def answer(request):
        blocked = row_of(request)["query"] == "question 1"
        return (400, error("content filter")) if blocked else good(request)

    with serve(answer) as endpoint:
        thoughts = teacher(endpoint).write(rows(3), cache=tmp_path / "c.jsonl")
        assert [thought.text is None for thought in thoughts] == [False, True, False]
        assert "content filter" in thoughts[1].reason
        endpoint.requests.clear()
        endpoint.answer = good
        assert all(t.text for t in teacher(endpoint).write(rows(3), cache=tmp_path / "c.jsonl"))
        assert endpoint.queries() == ["question 1"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "rejects the key"),
        (404, "is not found"),
        (429, "keeps failing .* run the same command again"),
        (500, "keeps failing"),
    ],
)
def test_failures_for_good_are_one_clear_line_and_keep_what_is_done(tmp_path, status, message):
    def answer(request):
        fails = row_of(request)["query"] == "question 2"
        return (status, error("no")) if fails else good(request)

    with serve(answer) as endpoint:
        bought = teacher(endpoint, limits=Limits(concurrency=1, retries=2))
        with pytest.raises(TellError, match=message) as raised:
            bought.write(rows(6), cache=tmp_path / "c.jsonl")
        assert "\n" not in str(raised.value) and "secret-key" not in str(raised.value)
        done = [json.loads(line)["id"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]
        assert done[:2] == ["0", "1"] and "2" not in done
        endpoint.requests.clear()
        endpoint.answer = good
        assert len(teacher(endpoint).write(rows(6), cache=tmp_path / "c.jsonl")) == 6
        assert not {f"question {i}" for i in done} & set(endpoint.queries())


def test_an_endpoint_that_is_not_there(tmp_path):
    with serve() as endpoint:
        pass  # its port is free again
    with pytest.raises(TellError, match="cannot be reached"):
        teacher(endpoint, limits=Limits(retries=0)).write(rows(1), cache=tmp_path / "c.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_an_endpoint_that_cannot_do_it_is_given_up(tmp_path):
    refusal = r"none of the first 20 rows got a usable answer \(the last: 1 answers"
    with serve(lambda request: (200, "Sure! Here it is:")) as endpoint, pytest.raises(TellError, match=refusal):
        teacher(endpoint, limits=Limits(attempts=1, concurrency=2)).write(rows(300), cache=tmp_path / "c.jsonl")
    assert 20 <= len(endpoint.requests) < 300


def test_the_cache_is_by_model_and_messages(tmp_path):
    cache = tmp_path / "c.jsonl"
    with serve() as endpoint:
        first = teacher(endpoint).write(rows(4), cache=cache)
        again = teacher(endpoint)
        assert again.write(rows(4), cache=cache) == first and len(endpoint.requests) == 4
        assert (again.usage.answers, again.usage.reused) == (0, 4)
        assert again.usage.line().endswith("; 4 rows reused from an earlier run")
        OpenAITeacher(endpoint.url, "other", "k").write(rows(4), cache=cache)
        assert len(endpoint.requests) == 8
        changed = [HaluRow(r.id, r.query, r.response + "!", r.label, r.spans, r.origin) for r in rows(4)]
        teacher(endpoint).write(changed, cache=cache)
        assert len(endpoint.requests) == 12


def test_a_torn_cache_line_costs_one_row_only(tmp_path):
    cache = tmp_path / "c.jsonl"
    with serve() as endpoint:
        teacher(endpoint, limits=Limits(concurrency=1)).write(rows(4), cache=cache)
        cache.write_bytes(cache.read_bytes()[:-30])
        endpoint.requests.clear()
        teacher(endpoint).write(rows(4), cache=cache)
        assert endpoint.queries() == ["question 3"]
        endpoint.requests.clear()
        teacher(endpoint).write(rows(4), cache=cache)
        assert endpoint.requests == []


SCRIPT = """
import sys
from tell.paper import Limits, OpenAITeacher, build_halu_cot_json
source, out, url = sys.argv[1:]
build_halu_cot_json(source, out, teacher=OpenAITeacher(url, "tiny", "k", limits=Limits(concurrency=2)))
"""


def test_a_killed_build_goes_on_and_repeats_no_finished_row(tmp_path):
    source = tmp_path / "halueval.jsonl"
    with source.open("w") as file:
        for row in rows(12):
            record = {"ID": row.id, "user_query": row.query, "chatgpt_response": row.response}
            file.write(json.dumps({**record, "hallucination": row.label, "hallucination_spans": []}) + "\n")
    out, held, release = tmp_path / "out", threading.Semaphore(5), threading.Event()

    def answer(request):
        if not held.acquire(blocking=False):
            release.wait(60)  # five rows are answered, then nothing comes any more
        return good(request)

    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])}
    with serve(answer) as endpoint:
        command = [sys.executable, "-c", SCRIPT, str(source), str(out), endpoint.url]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        cache = out / "teacher.jsonl"
        until = time.monotonic() + 60
        while not (cache.exists() and cache.read_bytes().count(b"\n") == 5):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < until
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert sorted(path.name for path in out.iterdir()) == ["teacher.jsonl"]  # no half dataset
        finished = {json.loads(line)["id"] for line in cache.read_text().splitlines()}
        release.set()
        endpoint.requests.clear()
        endpoint.answer = good
        built = build_halu_cot_json(source, out, teacher=OpenAITeacher(endpoint.url, "tiny", "k"))
        asked = Counter(query.split()[1] for query in endpoint.queries())
    assert set(asked) == {str(i) for i in range(12)} - finished and set(asked.values()) == {1}
    assert built.train == 12 and built.usage.reused == 5
    assert len((out / "train.jsonl").read_text().splitlines()) == 12


def test_dropped_rows_are_counted_in_the_build(tmp_path):
    source = tmp_path / "h.jsonl"
    lines = [
        {"ID": str(i), "user_query": f"question {i}", "chatgpt_response": "x", "hallucination": "no"} for i in range(3)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def answer(request):
        return (200, "nonsense") if row_of(request)["query"] == "question 1" else good(request)

    with serve(answer) as endpoint:
        built = build_halu_cot_json(source, tmp_path / "out", teacher=teacher(endpoint))
    assert built.train == 2 and built.dropped == [(f"{source}:2", "3 answers, the last is not JSON")]
    assert any(line.startswith("1 rows dropped") for line in built.lines())
    assert any("5 answers, 500 tokens in" in line for line in built.lines())


def test_bad_settings_are_refused(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(TellError, match="no API key"):
        OpenAITeacher(None, "m")
    with pytest.raises(TellError, match="'localhost:1' is not an http address"):
        OpenAITeacher("localhost:1", "m")
    with pytest.raises(TellError, match="concurrency is 0"):
        OpenAITeacher("http://localhost:1", "m", limits=Limits(concurrency=0))


def reply(**changes) -> dict:
    return {**completion("m", '{"thought": "There is no hallucination.", "hallucination": "no"}'), **changes}


STRANGE = {
    "HTML": b"<html>login</html>",
    "a text": b'"hello"',
    "a list": b"[1, 2]",
    "choices that are none": json.dumps(reply(choices="x")).encode(),
    "null": b"null",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", STRANGE)
def test_replies_of_what_is_no_such_endpoint_are_one_line(tmp_path, kind):
    with serve(lambda request: (200, STRANGE[kind])) as endpoint, pytest.raises(TellError) as raised:
        teacher(endpoint, limits=Limits(retries=0, attempts=1, concurrency=1)).write(
            rows(25), cache=tmp_path / "c.jsonl"
        )
    assert "\n" not in str(raised.value) and endpoint.url in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"usage": None},
        {"usage": {"prompt_tokens": None, "completion_tokens": "many"}},
        {"usage": []},
        {
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": [
                            {
                                "type": "text",
                                "text": '{"thought": "There is no hallucination.", "hallucination": "no"}',
                            },
                            {"type": "image"},
                        ],
                    },
                }
            ]
        },
    ],
    ids=["null usage", "null counts", "a list", "parts"],
)
def test_usage_that_is_not_there_and_answers_in_parts(tmp_path, changes):
    wanted = [row for row in rows(8) if row.label == "no"]
    with serve(lambda request: (200, reply(**changes))) as endpoint:
        thoughts = teacher(endpoint).write(wanted, cache=tmp_path / "c.jsonl")
    assert all(thought.text == "There is no hallucination." for thought in thoughts)


@pytest.mark.parametrize("content", [None, 5, {}, "[" * 100_000, '{"thought": "\\ud83d", "hallucination": "no"}'])
def test_contents_that_cannot_be_used_drop_the_row(tmp_path, content):
    body = reply(choices=[{"index": 0, "message": {"role": "assistant", "content": content}}])
    with serve(lambda request: (200, body)) as endpoint:
        thoughts = teacher(endpoint, limits=Limits(attempts=1)).write(rows(3), cache=tmp_path / "c.jsonl")
    assert [thought.text for thought in thoughts] == [None] * 3


def test_keys_and_passwords_are_not_printed(tmp_path):
    def echo(request):
        return 401, error("the key secret-key is not known")

    with serve(echo) as endpoint:
        endpoint.url = endpoint.url.replace("//", "//user:password@")
        with pytest.raises(TellError) as raised:
            teacher(endpoint, limits=Limits(retries=0)).write(rows(1), cache=tmp_path / "c.jsonl")
        assert "secret-key" not in str(raised.value) and "password" not in str(raised.value)
    with pytest.raises(TellError) as raised:
        OpenAITeacher("ftp://user:password@host/v1", "m", "secret-key")
    assert "password" not in str(raised.value)


def test_without_the_package_the_remedy_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(TellError, match=r'openai is not installed. pip install "tell-llm\[teacher\]"'):
        OpenAITeacher("http://localhost:1", "m")
