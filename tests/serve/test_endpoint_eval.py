"""`tell eval --endpoint`: our own server, and others that fail, refuse, or do not say what they are."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from paper.server import completion
from paper.server import serve as foreign
from serve.serving import running
from tell.cli.main import run as command
from tell.errors import TellError
from tell.files import read_jsonl
from tell.progress import Silent
from tell.verbs.evaluate_endpoint import Server, evaluate_endpoint

KEY = "sk-very-secret-key"


@pytest.fixture
def root(runs, tmp_path) -> Path:
    shutil.copytree(runs["reviews"], tmp_path / "reviews")
    return tmp_path / "reviews"


def asked(request: dict) -> str:
    return request["messages"][-1]["content"]


def right(root: Path):
    """Answers as the references say."""
    rows = read_jsonl(root / "predictions/tell.jsonl")

    def answer(request: dict) -> tuple[int, str]:
        return 200, next(row["reference"] for row in rows if asked(request).endswith(row["prompt"]))

    return answer


@pytest.mark.parametrize("arm", ["tell", "tell-free", "base"])
def test_our_own_server_scores_as_the_run_did(arm, runs, models, root, tmp_path):
    display = Silent()
    with running(models) as server:
        found = evaluate_endpoint(root, Server(f"{server.url}/v1", f"reviews/{arm}"), display=display)
        told = {"base": "no anchor"}.get(arm, "the server puts the anchor on the prompts itself")
        assert display.notes[0] == f"endpoint: reviews/{arm} at {server.url}/v1; {told}"
        again = Silent()
        assert evaluate_endpoint(root, Server(f"{server.url}/v1", f"reviews/{arm}"), display=again) == found
        assert "5 answers of an earlier command are reused (--fresh asks again)" in again.notes
        assert len(server.replies) == 5
        fresh = evaluate_endpoint(root, Server(f"{server.url}/v1", f"reviews/{arm}", fresh=True))
        assert fresh == found and len(server.replies) == 10
    metrics = json.loads((root / "metrics.json").read_text())
    assert found["arms"]["endpoint"] == {k: v for k, v in metrics["arms"][arm].items() if k != "answer_loss"}
    assert {a: v for a, v in found["arms"].items() if a != "endpoint"} == metrics["arms"]
    assert {"tell - endpoint", "endpoint - base"} <= set(found["differences"])
    assert found["differences"]["tell - base"] == metrics["differences"]["tell - base"]
    labels, baseline = found["labels"]["arms"], found["baseline"]
    assert labels.pop("endpoint") == labels[arm] and labels == metrics["labels"]["arms"]
    assert baseline["differences"].pop("endpoint") == baseline["differences"][arm]
    assert baseline == metrics["baseline"]
    answers = [(row["hash"], row["answer"], row["finish"]) for row in read_jsonl(root / f"predictions/{arm}.jsonl")]
    kept = read_jsonl(root / "predictions/eval/endpoint.jsonl")
    assert [(row["hash"], row["answer"], row["finish"]) for row in kept] == answers


def test_the_run_is_the_model_unless_another_is_named(models, root):
    with running(models) as server:
        found = evaluate_endpoint(root, Server(f"{server.url}/v1", arms=["base"]), rows=3)
    assert found["endpoint"]["model"] == "reviews" and list(found["arms"]) == ["base", "endpoint"]
    assert found["arms"]["endpoint"]["accuracy"]["n"] == 3


def test_a_foreign_server_gets_the_anchor(root, monkeypatch):
    """Retried after 429 and 503; the key is sent, and written nowhere."""
    monkeypatch.setenv("MY_KEY", KEY)
    failures = {}

    def answer(request):
        tries = failures[asked(request)] = failures.get(asked(request), 0) + 1
        if tries < 3:
            return (429, 503)[tries - 1], {"error": {"message": f"busy, {KEY}"}}
        return right(root)(request)

    display = Silent()
    with foreign(answer) as endpoint:
        found = evaluate_endpoint(root, Server(endpoint.url, "large", key_name="MY_KEY"), display=display)
        requests = list(endpoint.requests)
        assert endpoint.keys == {f"Bearer {KEY}"}
        plain = evaluate_endpoint(root, Server(endpoint.url, "large", anchored=False, key_name="MY_KEY"))
        later = endpoint.requests[len(requests) :]
    assert display.notes[0] == f"endpoint: large at {endpoint.url}; the anchor is in the prompts"
    assert found["arms"]["endpoint"]["accuracy"]["value"] == 1 and found["endpoint"]["anchor"] == "prompts"
    assert all(asked(request).startswith("Positive, negative or mixed?\n\n") for request in requests)
    assert {request["temperature"] for request in requests} == {0} and {r["max_tokens"] for r in requests} == {80}
    assert plain["endpoint"]["anchor"] == "none" and not any("Positive, neg" in asked(request) for request in later)
    written = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert KEY.encode() not in written and KEY not in json.dumps(found)


def test_fixed_examples_are_sent_once(root):
    """They are in the prompts, unless the server's own template has them, as that of an export: then rows are bare."""
    split = json.loads((root / "split.json").read_text())
    (root / "split.json").write_text(json.dumps({**split, "shots": split["train"][:1]}))
    display = Silent()
    with foreign(right(root)) as endpoint:
        evaluate_endpoint(root, Server(endpoint.url, "large"), rows=2, display=display)
        shown = list(endpoint.requests)
        evaluate_endpoint(root, Server(endpoint.url, "large", anchored=False), rows=2)
        bare = endpoint.requests[len(shown) :]
    assert [len(request["messages"]) for request in (*shown, *bare)] == [3, 3, 1, 1]
    assert shown[0]["messages"][0]["content"].startswith("Positive, negative or mixed?")
    assert any("--no-anchor" in note and "show them twice" in note for note in display.notes)


def test_a_stopped_evaluation_goes_on(root):
    """What was answered before the failure is not asked again."""
    lock, seen = threading.Lock(), []

    def answer(request):
        with lock:
            seen.append(asked(request))
            if len(seen) > 3:
                return 401, {"error": {"message": "the key has expired"}}
        return right(root)(request)

    with foreign(answer) as endpoint:
        with pytest.raises(TellError, match=r"rejects the key .*expired.*Set OPENAI_API_KEY"):
            evaluate_endpoint(root, Server(endpoint.url, "m", concurrency=1))
        assert not (root / "predictions/eval/endpoint.jsonl").exists()
        before = set(seen[:3])
        with (root / "predictions/endpoints.jsonl").open("a") as file:
            file.write('{"request": "torn')
        endpoint.answer = right(root)
        endpoint.requests.clear()
        found = evaluate_endpoint(root, Server(endpoint.url, "m"))
    assert found["arms"]["endpoint"]["accuracy"]["value"] == 1
    assert len(endpoint.requests) == 2 and not before & {asked(request) for request in endpoint.requests}


def test_rejected_cut_and_unknown_options_are_said(root):
    first = read_jsonl(root / "predictions/tell.jsonl")[0]["prompt"]

    def answer(request):
        for name in ("seed", "max_tokens"):
            if name in request:
                hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                return 400, {"error": {"message": f"Unsupported parameter: '{name}'.{hint}"}}
        if asked(request).endswith(first):
            return 400, {"error": {"message": "content filter\nsecond line"}}
        body = completion("m", "posi")
        body["choices"][0]["finish_reason"] = "length"
        return 200, body

    display = Silent()
    with foreign(answer) as endpoint:
        found = evaluate_endpoint(root, Server(endpoint.url, "m", concurrency=1), display=display)
        assert endpoint.requests[-1]["max_completion_tokens"] == 80
    assert found["arms"]["endpoint"]["accuracy"]["value"] == 0
    assert any("1 of 5 prompts are rejected and count as wrong (the first: " in note for note in display.notes)
    assert any("4 of 5 answers are cut at the limit of 80 tokens" in note for note in display.notes)
    assert "the endpoint takes no seed, so its own setting is used" in display.notes
    endpoint.answer = lambda request: (400, {"error": {"message": "no such model"}})
    with foreign(endpoint.answer) as other, pytest.raises(TellError, match=r"rejects every request .*no such model"):
        evaluate_endpoint(root, Server(other.url, "m"))


def test_other_rows_and_bad_input(root, tmp_path):
    rows = [{"text": f"The {word} broke at once.", "label": "negative"} for word in ("lamp", "kettle")]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with foreign(lambda request: (200, "negative")) as endpoint:
        found = evaluate_endpoint(root, Server(endpoint.url, "m"), test=str(other))
        assert list(found["arms"]) == ["endpoint"] and found["arms"]["endpoint"]["accuracy"]["n"] == 2
        with pytest.raises(TellError, match="the run has no answers of the arm tell to all of these rows"):
            evaluate_endpoint(root, Server(endpoint.url, "m", arms=["tell"]), test=str(other))
        assert len(endpoint.requests) == 2
        with pytest.raises(TellError, match=r"the server does not list its models\. Name one with --model"):
            evaluate_endpoint(root, Server(endpoint.url))
        endpoint.models = ["a", "b"]
        with pytest.raises(TellError, match=r"the server has 2 models \(a, b\). Name one with --model"):
            evaluate_endpoint(root, Server(endpoint.url))
        endpoint.models = ["only"]
        found = evaluate_endpoint(root, Server(endpoint.url))
        assert found["endpoint"] == {"url": endpoint.url, "model": "only", "anchor": "prompts"}
    with pytest.raises(TellError, match="cannot be reached"):
        evaluate_endpoint(root, Server(endpoint.url, "m", retries=0))
    with pytest.raises(TellError, match="base URL 'localhost:1' is not an http address"):
        evaluate_endpoint(root, Server("localhost:1", "m"))
    with pytest.raises(TellError, match="no such run folder"):
        evaluate_endpoint(tmp_path / "nowhere", Server("http://localhost:1", "m"))


def test_the_command(root, models, capsys):
    with running(models) as server:
        url = f"{server.url}/v1"
        assert command(["eval", str(root), "--endpoint", url, "--model", "reviews/base"]) == 0
        shown = capsys.readouterr()
        assert "endpoint" in shown.out
        assert "no anchor" in shown.err
        assert command(["eval", str(root), "--endpoint", url, "--model", "reviews", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["endpoint"]["anchor"] == "server"
        assert command(["eval", str(root), "--endpoint", url, "--model", "other"]) == 2
        assert "is not found" in capsys.readouterr().err
    assert command(["eval", str(root), "--model", "m"]) == 2
    assert "--model: has no effect without --endpoint" in capsys.readouterr().err
    assert command(["eval", str(root), "--endpoint", url, "--concurrency", "0"]) == 2
    assert "--concurrency: 0 requests at once" in capsys.readouterr().err
    assert command(["eval", str(root), "--endpoint", url, "--benchmarks", "gsm8k"]) == 2
    assert "--endpoint: has no effect on benchmarks" in capsys.readouterr().err
    assert command(["serve"]) == 2 and "no run is given" in capsys.readouterr().err
    assert command(["serve", str(root), "--port", "70000"]) == 2 and "70000 is no port" in capsys.readouterr().err
