"""Benchmarks of a run: before and after, cached, without any connection."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

import tell
from run.questions import FILES, write_questions
from run.runs import Killer, config_of, read
from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.cli.main import run as main
from tell.errors import Interrupted, TellError
from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.metric_names import CHANGE
from tell.run.benchmarks import run_benchmarks as module
from tell.run.benchmarks.run_benchmarks import benchmark_arms, check_benchmarks
from tell.studies.stats.shared_rows import levels_and_changes, read_questions
from tell.verbs.benchmark import BenchmarkOptions, benchmark

TASKS = ("agieval_jec_qa_kd", "agieval_math", "agieval_sat_math")


@pytest.fixture(autouse=True)
def no_connection(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> RunFolder:
    """A run without benchmarks; tests that score it copy it."""
    eval_ = {"arms": ["base", "base+anchor", "icl", "tell", "tell-anchor"], "forgetting_rows": 0}
    return tell.tune(config_of(tiny_model("llama"), tmp_path_factory.mktemp("run") / "run", eval=eval_))


@pytest.fixture
def copy(run, tmp_path) -> RunFolder:
    return RunFolder(shutil.copytree(run.root, tmp_path / "run"))


def ask(copy: RunFolder, benchmarks: list[str], *, data: Path, arms: list[str] | None = None, **options) -> dict:
    """metrics.json of a run scored on questions of a folder; ``options`` as of `BenchmarkOptions`."""
    return benchmark(copy.root, benchmarks, arms=arms, options=BenchmarkOptions(data=str(data), **options))


def harness() -> None:
    pytest.importorskip("lm_eval", reason='needs lm-evaluation-harness: pip install "tell-llm[harness]"')


def test_arms_that_differ():
    """The untuned model, then each adapter; the anchor tells arms apart only where it is put on the questions."""
    arms = ["base", "base+anchor", "icl", "sft", "tell", "tell-anchor"]
    assert benchmark_arms(arms, NO_ANCHOR) == ["base", "sft", "tell"]
    anchor = Anchor("Sort this.")
    assert benchmark_arms(arms, anchor) == ["base", "base+anchor", "sft", "tell", "tell-anchor"]
    assert benchmark_arms(["tell"], anchor) == ["base", "tell"]


def test_before_and_after(copy, questions, monkeypatch):
    harness()
    before = read(copy.metrics)
    metrics = ask(copy, ["openbookqa", "agieval"], data=questions)
    found = metrics.pop("benchmarks")
    assert 'id="benchmarks"' in copy.report.read_text(encoding="utf-8")
    assert metrics == before and read(copy.metrics)["benchmarks"] == json.loads(json.dumps(found))
    assert list(found["arms"]) == ["base", "tell"] and list(found["differences"]) == ["tell - base"]
    # the cloze task has no acc_norm that AGIEval could have the mean of
    names = ["openbookqa", "openbookqa acc_norm", "agieval", *TASKS, *(f"{TASKS[i]} acc_norm" for i in (0, 2))]
    assert sorted(found["arms"]["tell"]) == sorted(names)
    rows = {
        (arm, task): read_jsonl(copy.predictions / f"benchmarks/{arm}/{task}.jsonl")
        for arm in found["arms"]
        for task in ("openbookqa", *TASKS)
    }
    for arm, numbers in found["arms"].items():
        means = {task: np.mean([row["scores"]["acc"] for row in rows[arm, task]]) for task in ("openbookqa", *TASKS)}
        for task, mean in means.items():
            assert numbers[task]["value"] == pytest.approx(mean, abs=1e-6)
            assert numbers[task]["n"] == len(rows[arm, task])
        assert numbers["agieval"]["value"] == pytest.approx(np.mean([means[t] for t in TASKS]), abs=1e-6)
        assert found["eval"]["arms"][arm]["flops"] > 0
    gap = found["differences"]["tell - base"]["openbookqa"]
    a, b = (found["arms"][arm]["openbookqa"]["value"] for arm in ("tell", "base"))
    assert gap["value"] == pytest.approx(a - b, abs=1e-6) and gap["n"] == len(FILES["openbookqa_test.jsonl"])
    # a study reads every number of metrics.json back question by question
    kept = {arm: read_questions(copy, arm, found["settings"]["tasks"]) for arm in found["arms"]}
    for arm, numbers in found["arms"].items():
        assert {n: round(r.metric.value, 6) for n, r in kept[arm].items()} == {
            n: e["value"] for n, e in numbers.items()
        }
        assert len(kept[arm]["agieval"].hashes) == sum(len(rows[arm, task]) for task in TASKS)
        assert all(len(r.hashes) == len(set(r.hashes.tolist())) for r in kept[arm].values())
    for name, entry in found["differences"]["tell - base"].items():
        change = levels_and_changes(kept["tell"][name], kept["base"][name])[CHANGE]
        assert change.metric.value == pytest.approx(entry["value"], abs=1e-6)
    # the adapter was merged for its turn
    likelihoods = [[row["loglikelihoods"] for row in rows[arm, "openbookqa"]] for arm in ("base", "tell")]
    assert not np.allclose(*likelihoods)
    assert "benchmarks" in tell.evaluate(copy.root, arms=["base"], rows=1)

    def never(*_, **__):
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        patch.setattr("tell.run.benchmarks.harness.answer_task", never)
        again = ask(copy, ["agieval_math", "openbookqa"], data=questions)["benchmarks"]
        assert again["arms"]["tell"]["openbookqa"] == found["arms"]["tell"]["openbookqa"]
        # another run on this machine finds what the untuned model answered, but asks its own adapter
        shutil.rmtree(copy.predictions / "benchmarks")
        with pytest.raises(AssertionError, match="asked again"):
            ask(copy, ["openbookqa"], data=questions)
        assert (copy.predictions / "benchmarks/base/openbookqa.jsonl").exists()
        with pytest.raises(AssertionError, match="asked again"):
            ask(copy, ["openbookqa"], data=questions, limit=1)


def test_anchor_chat_limit_and_shots(copy, questions):
    """Each is taken to the prompts, and told in the settings."""
    harness()

    def likelihoods(**options) -> tuple[dict, dict]:
        found = ask(copy, ["openbookqa"], data=questions, limit=2, **options)["benchmarks"]
        place = copy.predictions / "benchmarks"
        rows = {arm: read_jsonl(place / arm / "openbookqa.jsonl") for arm in found["arms"]}
        assert all(len(found) == 2 for found in rows.values())
        return {arm: [row["loglikelihoods"] for row in found] for arm, found in rows.items()}, found["settings"]

    plain, settings = likelihoods()
    assert (settings["limit"], settings["shots"], settings["anchor"]) == (2, {"openbookqa": 0}, False)
    anchored, settings = likelihoods(anchor=True)
    assert settings["anchor"] and list(anchored) == ["base", "base+anchor", "tell", "tell-anchor"]
    assert anchored["base"] == plain["base"] and anchored["tell-anchor"] == plain["tell"]
    assert anchored["base+anchor"] != plain["base"] and anchored["tell"] != plain["tell"]
    templated, settings = likelihoods(chat=True)
    assert settings["chat"] and templated["base"] != plain["base"]
    shown, settings = likelihoods(shots=1)
    assert settings["shots"] == {"openbookqa": 1} and shown["base"] != plain["base"]


def test_from_the_command_line(copy, questions, capsys, monkeypatch):
    harness()
    monkeypatch.setenv("COLUMNS", "160")
    typed = ["eval", str(copy.root), "--benchmarks", "openbookqa, agieval_math", "--benchmark-data", str(questions)]
    assert main([*typed, "--benchmark-limit", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["benchmarks"]
    assert found["settings"]["tasks"] == {"openbookqa": ["openbookqa"], "agieval_math": ["agieval_math"]}
    assert found["arms"]["tell"]["openbookqa"]["n"] == 2
    assert main([*typed, "--benchmark-limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert "openbookqa acc_norm" in shown and "tell - base" in shown and "the first 2 questions" in shown
    assert main([*typed, "--rows", "3"]) == 2
    assert "--rows: has no effect on benchmarks" in capsys.readouterr().err


def test_a_run_with_benchmarks_resumes(tiny_model, questions, tmp_path):
    """Stopped between two tasks, it ends with the numbers of a run that never was; what was answered stays."""
    harness()
    asked = {"benchmarks": ["gsm8k", "openbookqa"], "benchmark_data": str(questions), "benchmark_shots": 1}
    settings = {"eval": {**asked, "arms": ["tell"], "forgetting_rows": 0}}

    def config(name: str):
        return config_of(tiny_model("llama"), tmp_path / name, **settings)

    whole = tell.tune(config("whole"))
    with pytest.raises(Interrupted):
        tell.tune(config("stopped"), display=Killer("openbookqa tell"))
    stopped = RunFolder(tmp_path / "stopped")
    kept = stopped.predictions / "benchmarks/tell/gsm8k.jsonl"
    written = kept.stat().st_mtime_ns
    assert not (stopped.predictions / "benchmarks/tell/openbookqa.json").exists()
    tell.tune(config("stopped"), resume=True)
    assert read(stopped.metrics)["benchmarks"] == read(whole.metrics)["benchmarks"]
    assert kept.stat().st_mtime_ns == written
    numbers = read(whole.metrics)["benchmarks"]
    assert list(numbers["arms"]) == ["base", "tell"], "what training changed needs a before"
    assert {"gsm8k", "gsm8k flexible-extract", "openbookqa"} < set(numbers["arms"]["tell"])


def test_what_is_refused(copy, questions, tmp_path, tiny_model):
    harness()
    with pytest.raises(TellError, match=r"unknown benchmark 'gsm'; did you mean gsm8k\?"):
        ask(copy, ["gsm"], data=questions)
    with pytest.raises(TellError, match="no benchmark is requested"):
        benchmark(copy.root)
    with pytest.raises(TellError, match="has no file for gsm8k"):
        ask(copy, ["gsm8k"], data=tmp_path)
    with pytest.raises(TellError, match=r"eval\.benchmark_limit"):
        ask(copy, ["gsm8k"], data=questions, limit=0)
    with pytest.raises(TellError, match="no adapter for the arm sft"):
        ask(copy, ["gsm8k"], data=questions, arms=["sft"])
    # a run says so before it trains
    config = config_of(tiny_model("llama"), tmp_path / "new", eval={"benchmarks": ["gsm"]})
    with pytest.raises(TellError, match="unknown benchmark"):
        tell.tune(config)
    assert not (tmp_path / "new").exists()


def test_without_the_harness(monkeypatch, tiny_model, tmp_path):
    def missing(name: str) -> str:
        raise module.PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    config = config_of(tiny_model("llama"), tmp_path / "run", eval={"benchmarks": ["gsm8k"]})
    with pytest.raises(TellError, match=r'pip install "tell-llm\[harness\]"'):
        check_benchmarks(config)


def test_a_second_benchmark_stands_beside_the_first(copy, questions, monkeypatch):
    """Asked alike, nothing is asked twice; asked otherwise, the numbers could not be compared."""
    harness()
    ask(copy, ["openbookqa"], data=questions)
    kept = copy.predictions / "benchmarks/tell/openbookqa.jsonl"
    written = kept.stat().st_mtime_ns
    asked = []
    original = module._answers
    monkeypatch.setattr(
        module,
        "_answers",
        lambda questions, arm, *rest: asked.append(arm) or original(questions, arm, *rest),
    )
    found = ask(copy, ["agieval"], data=questions, arms=["base"])["benchmarks"]
    assert asked == ["base", "tell"] and list(found["settings"]["tasks"]) == ["openbookqa", "agieval"]
    assert {"openbookqa", "agieval"} <= found["arms"]["tell"].keys() and kept.stat().st_mtime_ns == written
    again = ask(copy, ["openbookqa"], data=questions, limit=1)["benchmarks"]
    assert list(again["settings"]["tasks"]) == ["openbookqa"] and again["arms"]["tell"]["openbookqa"]["n"] == 1
