"""The verbs from file to report, on a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import forked
from homes import home_with_kernels
from tell.cli.main import run

SUPPORT = Path(__file__).parents[2] / "examples/support"
TITLES = Path(__file__).parents[2] / "examples/titles/train.jsonl"
SMALL = (
    *("--test", str(SUPPORT / "test.jsonl"), "--schema", str(SUPPORT / "schema.json")),
    *("--general", str(TITLES), "--general-rows", "12", "--task-rows", "8", "--test-rows", "8"),
    *("--anchor", "Sort this mail.", "--arms", "base,tell", "--seed", "7"),
    *("--set", "generate.max_new_tokens=8", "--set", "eval.forgetting_rows=4", "--set", "eval.forgetting_answers=2"),
    *("--set", "train.batch_size=16", "--set", "eval.bootstrap=100"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return home_with_kernels(tmp_path_factory.mktemp("home"))


def tell(home: Path, *argv: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    return forked.run(*argv, env={**os.environ, "TELL_HOME": str(home), "COLUMNS": "120"}, input=input)


@pytest.fixture(scope="module")
def finished(tiny_model, home, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run folder and what the command said."""
    out = tmp_path_factory.mktemp("runs") / "support"
    argv = ("tune", str(SUPPORT / "train.jsonl"), *SMALL, "--model", str(tiny_model("llama")), "--out", str(out))
    return out, tell(home, *argv)


def test_tune_ends_with_adapter_scores_and_report(finished):
    out, result = finished
    assert result.returncode == 0, result.stderr
    for name in ("run.yaml", "metrics.json", "report.html", "adapter/adapter_model.safetensors", "anchor.json"):
        assert (out / name).stat().st_size > 0
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    for part in ("schema adherence", "8 test rows", "loss, probe", "› ", str(out / "report.html"), f"tell chat {out}"):
        assert part in result.stdout
    assert "train tell" in result.stderr or "task:" in result.stderr
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr


def test_flags_are_what_the_run_did(finished):
    out, _ = finished
    plan = json.loads((out / "plan.json").read_text())
    assert plan["task"]["rows"] == 8 and plan["mixture"]["unique_rows"]["general"] == 12
    assert json.loads((out / "anchor.json").read_text())["text"] == "Sort this mail."
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["base", "tell"]
    rows = {name: entry["n"] for name, entry in metrics["arms"]["tell"].items()}
    assert rows.pop("item_f1") <= 8  # rows without an item on either side do not count
    assert set(rows.values()) == {8}


def test_plan_json_is_alone_and_agrees_with_the_run(finished, tiny_model, home):
    out, _ = finished
    result = tell(home, "plan", str(SUPPORT / "train.jsonl"), *SMALL, "--model", str(tiny_model("llama")), "--json")
    assert result.returncode == 0, result.stderr
    planned, done = json.loads(result.stdout), json.loads((out / "plan.json").read_text())
    assert planned["mixture"] == done["mixture"]
    assert planned["train"] == done["train"]


def test_plan_in_words(finished, tiny_model, capsys):
    argv = ["plan", str(SUPPORT / "train.jsonl"), *SMALL, "--model", str(tiny_model("llama"))]
    assert run(argv) == 0
    out = capsys.readouterr().out
    for part in ("tokens raw", "templated", "trained", "per step", "FLOPs", "GB of memory"):
        assert part in out


def test_plan_imports_no_torch(finished, tiny_model):
    code = "import sys; from tell.cli.main import run; assert run(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    argv = ["plan", str(SUPPORT / "train.jsonl"), *SMALL, "--model", str(tiny_model("llama"))]
    assert subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, timeout=120).returncode == 0


def test_a_finished_run_is_not_touched_without_being_told(finished, tiny_model, capsys):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    argv = ["tune", str(SUPPORT / "train.jsonl"), *SMALL, "--model", str(tiny_model("llama")), "--out", str(out)]
    assert run(argv) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_eval_prints_json_alone(finished, home):
    out, _ = finished
    result = tell(home, "eval", str(out), "--arms", "tell", "--rows", "6", "--greedy", "--json")
    assert result.returncode == 0, result.stderr
    metrics = json.loads(result.stdout)
    assert list(metrics["arms"]) == ["tell"]
    assert metrics["arms"]["tell"]["schema_adherence"]["n"] == 6


@pytest.mark.parametrize("piped", [False, True])
def test_chat_answers_one_message(finished, home, piped):
    out, _ = finished
    words = () if piped else ("where is my stuff?",)
    result = tell(home, "chat", str(out), "--greedy", *words, input="where is my stuff?" if piped else None)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() and result.stdout.endswith("\n")


def test_report_is_written_again(finished, capsys):
    out, _ = finished
    page = out / "report.html"
    page.unlink()
    assert run(["report", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")


def test_anchor_json_and_file(tiny_model, tmp_path, capsys):
    file = tmp_path / "anchor.txt"
    argv = ["anchor", str(SUPPORT / "train.jsonl"), "--model", str(tiny_model("llama")), "--candidates", "2"]
    assert run([*argv, "--json", "-o", str(file)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert file.read_text(encoding="utf-8").strip() == result["text"].strip()
    assert result["text"] in [candidate["text"] for candidate in result["candidates"]]
    assert run([*argv, "-o", str(file)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_separate_takes_a_run_and_its_adapter(finished, capsys):
    out, _ = finished
    assert run(["separate", str(out), "--adapter", "tell", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["queries"] == 8 and result["adapter"] == "tell" and result["anchor"]["text"] == "Sort this mail."
    assert result["general"].endswith("titles/train.jsonl")
    assert run(["separate", str(out), "-c", str(out / "run.yaml")]) == 2
    assert "a run and -c are both given" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_with_nothing_typed_twice(tiny_model, home, tmp_path):
    out = tmp_path / "out"
    argv = ["tune", str(SUPPORT / "train.jsonl"), *SMALL, "--model", str(tiny_model("llama")), "--out", str(out)]
    argv += ["--repeat", "12", "--set", "train.checkpoint_every=1"]
    with open(tmp_path / "shown.txt", "w", encoding="utf-8") as shown:
        process = forked.start(tuple(argv), {**os.environ, "TELL_HOME": str(home)}, stdout=shown, stderr=shown)
    log = out / "logs" / "tell.jsonl"
    while process.exitcode is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.02)
    process.terminate()
    process.join(forked.PATIENCE)
    err = (tmp_path / "shown.txt").read_text()
    assert process.exitcode == 130, err
    assert "--resume" in err.splitlines()[-1]
    assert json.loads((out / "status.json").read_text())["state"] == "interrupted"
    result = tell(home, "tune", "--resume", "--out", str(out))
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert json.loads((out / "metrics.json").read_text())["train"]["steps"] == len(steps)


def test_build_halu_cot_json(tmp_path, capsys):
    source = tmp_path / "general_data.json"
    items = [
        {"ID": str(i), "user_query": f"Name {i}.", "chatgpt_response": f"It is {i}.", "hallucination": label}
        | {"hallucination_spans": [f"It is {i}."] if label == "yes" else []}
        for i, label in enumerate(["yes", "no"] * 6)
    ]
    source.write_text("".join(json.dumps(item) + "\n" for item in items))
    out = tmp_path / "made"
    assert run(["build", "halu-cot-json", str(source), "-o", str(out), "--rows", "8"]) == 0
    assert "8 training rows" in capsys.readouterr().out
    assert len((out / "train.jsonl").read_text().splitlines()) == 8
    assert run(["build", "halu-cot-json", str(source), "-o", str(out), "--rows", "8"]) == 2
    assert "--overwrite" in capsys.readouterr().err
