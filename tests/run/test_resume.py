"""Stopped runs go on as if they had never been stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import forked
import tell
from run.runs import PROBE, Killer, comparable, config_of, read, steady_pace
from tell.decode.engine import Engine
from tell.errors import Interrupted, TellError
from tell.files import read_jsonl, write_json
from tell.folder import RunFolder
from tell.run.journal import Journal
from tell.run.speed import keep_speed
from tell.run.time_budget import fit_minutes

SECTIONS = {
    "eval": {"arms": ["base", "icl", "sft", "tell"]},
    "train": {"checkpoint_every": 2, "lora_dropout": 0.1},
    "mix": {"repeat": 4},
}


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> tuple[RunFolder, Callable[..., tell.Config]]:
    """A run that was never stopped, and its configuration for another folder."""
    root = tmp_path_factory.mktemp("whole")

    def config(out: Path, **sections) -> tell.Config:
        return config_of(tiny_model("llama"), out, **{**SECTIONS, **sections})

    return tell.tune(config(root / "run")), config


def files(folder: RunFolder) -> dict[str, bytes]:
    """What must be equal to the byte."""
    names = ["manifest.parquet", "anchor.json", "split.json", "run.yaml", "adapter/adapter_model.safetensors"]
    names += ["arms/sft/adapter_model.safetensors", *(f"predictions/{arm}.jsonl" for arm in SECTIONS["eval"]["arms"])]
    out = {name: (folder.root / name).read_bytes() for name in names}
    return {**out, "run.yaml": out["run.yaml"].replace(str(folder.root).encode(), b"")}


def same(a: RunFolder, b: RunFolder) -> None:
    assert files(a) == files(b)
    assert comparable(read(a.metrics)) == comparable(read(b.metrics))
    assert read(a.findings)["notices"] == read(b.findings)["notices"]
    for arm in ("tell", "sft"):
        logs = [[json.loads(line) for line in f.losses(arm).read_text().splitlines()] for f in (a, b)]
        assert [row | {"seconds": 0} for row in logs[0]] == [row | {"seconds": 0} for row in logs[1]]
    assert b.read_status()["state"] == "done"


MOMENTS = {
    "in the middle of training": ("train tell", 3, signal.SIGTERM),
    "in the first step": ("train tell", 1, signal.SIGINT),
    "between two arms": ("train sft", 1, signal.SIGTERM),
    "while answering": ("answer icl", 2, signal.SIGINT),
    "while measuring": ("tell: general loss", 1, signal.SIGTERM),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_equals_uninterrupted(whole, tmp_path, moment):
    folder, config = whole
    title, after, number = MOMENTS[moment]
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as stopped:
        tell.tune(config(tmp_path / "run"), display=Killer(title, after, number))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    other = RunFolder(tmp_path / "run")
    assert f"tell tune --resume --out {other.root}" in str(stopped.value) and stopped.value.exit_code == 130
    assert other.read_status()["state"] == "interrupted"
    assert not other.metrics.exists() and not other.report.exists()
    tell.tune(config(tmp_path / "run"), resume=True)
    same(folder, other)


def test_stopped_twice(whole, tmp_path):
    folder, config = whole
    resume = False
    for title in ("train tell", "answer sft"):
        with pytest.raises(Interrupted):
            tell.tune(config(tmp_path / "run"), display=Killer(title, 2), resume=resume)
        resume = True
    tell.tune(config(tmp_path / "run"), resume=True)
    same(folder, RunFolder(tmp_path / "run"))


def test_a_resumed_run_says_how_all_its_answers_were_decoded(whole, tmp_path, monkeypatch):
    """Those of finished arms too, and not as this session would decode them."""
    folder, config = whole
    other = RunFolder(shutil.copytree(folder.root, tmp_path / "run"))
    for path in (other.metrics, other.prediction("tell"), other.decoded("sft")):
        path.unlink()
    monkeypatch.setattr(Engine, "_words", lambda *_: "in another way")
    tell.tune(config(other.root, generate={"engine": "own"}), resume=True)  # which a run may go on with
    before, now = (read(f.findings)["computed"] for f in (folder, other))
    assert {name for name in before if name.startswith("decoding")} == {"decoding"}
    other_way = "TELL's own engine, in another way"
    assert {name: words for name, words in now.items() if name.startswith("decoding")} == {
        "decoding": before["decoding"],
        "decoding (base, general rows)": other_way,
        "decoding (sft)": "not known (answers of an earlier version)",
        "decoding (sft, general rows)": other_way,
        "decoding (tell)": other_way,
    }
    assert now["adapter"] == before["adapter"]
    assert read(other.decoded("tell"))["computed"][0] == f"decoding: {other_way}"


def test_killed_process(whole, tmp_path):
    """SIGKILL leaves no time for anything: the last checkpoint counts."""
    folder, config = whole
    slow = config(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(slow.to_yaml(), encoding="utf-8")
    with open(tmp_path / "shown.txt", "w", encoding="utf-8") as shown:
        process = forked.start(("tune", "-c", str(tmp_path / "run.yaml")), os.environ, stdout=shown, stderr=shown)
    other = RunFolder(tmp_path / "run")
    while process.exitcode is None and not (other.adapter / "checkpoint").exists():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "shown.txt").read_text()
    assert other.read_status()["state"] == "running"
    tell.tune(slow, resume=True)
    same(folder, other)


def test_seconds_add_up(tiny_model, tmp_path):
    """A session of 1,000 seconds that was stopped is in the run's total, and in that of a session stopped after it."""
    config, folder = config_of(tiny_model("llama"), tmp_path / "run", **SECTIONS), RunFolder(tmp_path / "run")
    with pytest.raises(Interrupted):
        tell.tune(config, display=Killer("train tell", 2))
    status = folder.read_status()
    assert 0 < status["seconds"] < 500
    write_json(folder.status, {**status, "seconds": 1000.0})
    with pytest.raises(Interrupted):
        tell.tune(config, display=Killer("answer sft", 1), resume=True)
    assert 1000 < folder.read_status()["seconds"] < 1500
    tell.tune(config, resume=True)
    assert 1000 < read(folder.findings)["seconds"] < 1500
    tell.tune(config, overwrite=True)
    assert 0 < read(folder.findings)["seconds"] < 500


def test_reading_the_inputs_counts(tiny_model, tmp_path, monkeypatch):
    """Among a run's seconds, and so among those of --max-minutes: its clock starts first."""
    begun = []

    def journal(*args, real=Journal.of, **more):
        begun.append("clock")
        return real(*args, **more)

    def inputs(*args):
        begun.append("inputs")
        raise TellError("unreadable")

    monkeypatch.setattr(Journal, "of", journal)
    monkeypatch.setattr("tell.run.tune.read_inputs", inputs)
    with pytest.raises(TellError, match="unreadable"):
        tell.tune(config_of(tiny_model("llama"), tmp_path / "run"))
    assert begun == ["clock", "inputs"]


def test_finished_run_resumed_changes_nothing(whole):
    folder, config = whole
    before = files(folder), comparable(read(folder.metrics))
    tell.tune(config(folder.root), resume=True)
    assert (files(folder), comparable(read(folder.metrics))) == before


def test_a_run_in_time_goes_on_with_the_rows_it_drew(tiny_model, tmp_path, monkeypatch):
    """--max-minutes: how much fits is decided once, however fast the machine is the second time."""
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    steady_pace(monkeypatch, train=300, decode=1000)
    sections = {"general": {"source": str(PROBE), "ratio": 1000.0, "rows": None}, "max_minutes": 2}
    config = config_of(tiny_model("llama"), tmp_path / "run", **sections)
    with pytest.raises(Interrupted):
        tell.tune(config, display=Killer("train tell", 2))
    folder = RunFolder(tmp_path / "run")
    manifest, plan = folder.manifest.read_bytes(), read(folder.plan)
    assert any("general rows are mixed in" in text for text in plan["notices"])
    steady_pace(monkeypatch, train=30_000, decode=1000)
    tell.tune(config, resume=True)
    assert folder.manifest.read_bytes() == manifest and read(folder.plan)["mixture"] == plan["mixture"]
    assert read(folder.metrics)["mixture"] == plan["mixture"]


def fitted(monkeypatch) -> list[str | None]:
    """The arm already trained, each time that a run is fitted into its minutes from here on."""
    fits: list[str | None] = []

    def fit(*args, trained=None, **more):
        fits.append(trained)
        return fit_minutes(*args, trained=trained, **more)

    monkeypatch.setattr("tell.run.in_time.fit_minutes", fit)
    return fits


def test_a_run_that_trains_nothing_is_fitted_once(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    steady_pace(monkeypatch, train=30_000, decode=3000)
    fits = fitted(monkeypatch)
    sections = {"general": {"source": "none"}, "eval": {"arms": ["base"], "forgetting_rows": 0}, "max_minutes": 3}
    tell.tune(config_of(tiny_model("llama"), tmp_path / "run", **sections))
    assert fits == [None]


def test_what_is_given_up_after_training_is_given_up_when_resumed(tiny_model, tmp_path, monkeypatch):
    """A leading arm slower than predicted costs test rows; a resumed run scores the same, as split.json says."""
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    steady_pace(monkeypatch, train=30_000, decode=3000)
    monkeypatch.setattr(
        "tell.run.train_arms.keep_speed", lambda task, loaded, speed: keep_speed(task, loaded, speed, 12)
    )
    sections = {
        "general": {"source": str(PROBE), "rows": 40},
        "task": {"rows": 6, "test_rows": 90},
        "eval": {"arms": ["base", "sft-matched", "tell"], "forgetting_rows": 0},
        "max_minutes": 3,
    }

    fits = fitted(monkeypatch)

    def config(name: str) -> tell.Config:
        return config_of(tiny_model("llama"), tmp_path / name, **sections)

    whole = tell.tune(config("whole"))
    assert fits == [None, "tell"]
    with pytest.raises(Interrupted):
        tell.tune(config("run"), display=Killer("train sft-matched", 2))
    folder = RunFolder(tmp_path / "run")
    assert read(folder.plan)["fit"]["test_rows"] == len(read(folder.split)["test"]) == 60
    fits.clear()
    tell.tune(config("run"), resume=True)
    assert not fits  # the leading arm was trained in the session before, which corrected the run
    assert read(folder.split) == read(whole.split)
    assert comparable(read(folder.metrics))["arms"] == comparable(read(whole.metrics))["arms"]
    assert [row["hash"] for row in read_jsonl(folder.prediction("tell"))] == read(folder.split)["test"]
    assert any("60 of 90 test rows" in text for text in read(folder.findings)["notices"])


def test_too_few_minutes_can_be_raised(tiny_model, tmp_path):
    """The refusal names minutes; with them the run goes on, but not with others once they decided what is done."""
    short = config_of(tiny_model("llama"), tmp_path / "run", max_minutes=1e-6)
    with pytest.raises(TellError, match="too short"):
        tell.tune(short)
    longer = config_of(tiny_model("llama"), tmp_path / "run", max_minutes=50)
    folder = tell.tune(longer, resume=True)
    assert folder.read_status()["state"] == "done"
    with pytest.raises(TellError, match="max_minutes"):
        tell.tune(short, resume=True)


def test_a_damaged_plan_is_refused(whole, tmp_path):
    folder, config = whole
    shutil.copytree(folder.root, tmp_path / "run")
    fit = {"arms": [], "test_rows": 5, "repeat": 4, "general_rows": 10}
    for part in ({"fit": 5}, {"fit": {"arms": ["tell"]}}, {"fit": fit}, {"general": {"path": "x"}}, {"general": 5}):
        (tmp_path / "run/plan.json").write_text(json.dumps(read(folder.plan) | part), encoding="utf-8")
        with pytest.raises(TellError, match=r"plan\.json: is damaged"):
            tell.tune(config(tmp_path / "run"), resume=True)


def test_a_damaged_split_or_manifest_is_refused(whole, tmp_path):
    folder, config = whole
    shutil.copytree(folder.root, tmp_path / "run")
    other = RunFolder(tmp_path / "run")
    pq.write_table(pq.read_table(other.manifest).replace_schema_metadata(None), other.manifest)
    with pytest.raises(TellError, match=r"manifest\.parquet: is not a manifest"):
        tell.tune(config(other.root), resume=True)
    other.split.write_bytes(other.split.read_bytes().replace(b"test", b"t\xc0st"))
    with pytest.raises(TellError, match=r"split\.json: "):
        tell.tune(config(other.root), resume=True)


def test_changed_data_is_refused(tiny_model, tmp_path):
    general = tmp_path / "general.jsonl"
    lines = PROBE.read_text(encoding="utf-8").splitlines()
    general.write_text("\n".join(lines[:40]), encoding="utf-8")
    config = config_of(tiny_model("llama"), tmp_path / "run", general={"source": str(general)})
    with pytest.raises(Interrupted):
        tell.tune(config, display=Killer("train tell", 2))
    general.write_text("\n".join(lines[20:60]), encoding="utf-8")
    with pytest.raises(TellError, match="has changed"):
        tell.tune(config, resume=True)
    general.write_text("\n".join(lines[:40]), encoding="utf-8")
    tell.tune(config, resume=True)
    assert RunFolder(tmp_path / "run").read_status()["state"] == "done"


def test_failure_is_written_down(tiny_model, tmp_path, monkeypatch):
    """A user's scorer that breaks at the end: the training is kept, and used once the scorer is mended."""
    (tmp_path / "my_scores.py").write_text("def f(answers, references): raise ValueError('broken')\n")
    monkeypatch.chdir(tmp_path)
    config = config_of(tiny_model("llama"), tmp_path / "run", task={"scorer": "my_scores:f"})
    with pytest.raises(TellError, match="broken"):
        tell.tune(config)
    folder = RunFolder(tmp_path / "run")
    status = folder.read_status()
    assert status["state"] == "failed" and "broken" in status["error"] and status["stage"] == "evaluate base"
    trained = folder.adapter / "adapter_model.safetensors"
    before = trained.stat().st_mtime_ns
    monkeypatch.delitem(sys.modules, "my_scores")
    (tmp_path / "my_scores.py").write_text("def f(answers, references): return [len(a) / 100 for a in answers]\n")
    for cached in tmp_path.glob("__pycache__/*"):
        cached.unlink()
    tell.tune(config, resume=True)
    assert trained.stat().st_mtime_ns == before
    assert read(folder.metrics)["task"]["primary"] == "f" and folder.read_status()["state"] == "done"
