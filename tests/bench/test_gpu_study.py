"""The study on a GPU, rehearsed on a CPU: cut by its limit, resumed from its pack, complete in the end."""

from __future__ import annotations

import json
import subprocess
import time
from types import SimpleNamespace

import pytest
from bench.gpu import study
from bench.gpu.__main__ import main

from tell.studies.packed import read_packed
from tell.studies.workers import LAST_STEP


def arguments(folder, tiny_model, *more):
    own = ["--study", "--tiny", "--device", "cpu", "--model", str(tiny_model("llama")), "--recipe", str(recipe(folder))]
    return [*own, "--out", str(folder / "out"), "--workers", "1", *more]


def recipe(folder):
    """The rehearsal with one seed: three cells."""
    text = (study.RECIPES / "rehearsal.yaml").read_text(encoding="utf-8")
    path = folder / "rehearsal.yaml"
    path.write_text(text.replace("${recipe}/../..", str(study.REPOSITORY)) + "seeds: [42]\n", encoding="utf-8")
    return path


def test_cut_by_the_limit_and_resumed_from_the_pack(tmp_path, tiny_model, monkeypatch, capsys):
    from tell.studies.queue import CellQueue

    fits = CellQueue._fits
    monkeypatch.setattr(CellQueue, "_fits", lambda self, cell: fits(self, cell) and cell.arm == "base")
    assert main(arguments(tmp_path, tiny_model, "--root", str(tmp_path / "first"))) == 0
    assert "2 cells were not begun" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [next(iter(facts["models"].values()))[key] for key in ("done", "waiting", "failed")] == [1, 2, 0]
    first = dict(read_packed(tmp_path / "out" / study.PACK))

    monkeypatch.undo()
    more = ["--root", str(tmp_path / "second"), "--resume", str(tmp_path / "out")]  # another machine, bare
    assert main(arguments(tmp_path, tiny_model, *more)) == 0
    facts = json.loads((tmp_path / "out" / "study.json").read_text())
    told = next(iter(facts["models"].values()))
    assert [told[key] for key in ("done", "waiting", "failed")] == [3, 0, 0] and told["tokens_trained"] > 0
    packed = dict(read_packed(tmp_path / "out" / study.PACK))
    assert len(packed) == 3 and packed.keys() > first.keys()
    (base,) = (name for name in first if name.startswith("base"))
    assert packed[base] == first[base]  # it was not run again
    text = json.dumps(packed)
    rows = packed[base]["predictions/base.jsonl"]
    assert "answer" not in rows[0] and rows[0]["hash"] and rows[0]["scores"] and "Sort this mail" not in text


def test_a_deadline_that_is_over_begins_nothing(tmp_path, tiny_model):
    assert main(arguments(tmp_path, tiny_model, "--root", str(tmp_path / "root"), "--deadline", "0")) == 1
    facts = json.loads((tmp_path / "out" / "study.json").read_text())
    assert next(iter(facts["models"].values()))["done"] == 0


def test_a_study_ends_before_the_deadline_even_if_it_has_to_be_stopped(tmp_path, monkeypatch):
    asked = []

    def run_study(recipe, *, out, execution, **options):
        asked.append((out.name, 60 * execution.minutes))
        return SimpleNamespace(failed=dict, read=lambda: {"cells": {}}, root=out)

    monkeypatch.setattr("tell.run_study", run_study)
    monkeypatch.setattr(study, "_model", lambda text: (text, "1e-3", 1.0))
    more = ["--deadline", "540", "--device", "cpu", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "out")]
    assert main(["--study", "--model", "Qwen/Qwen3-0.6B", "--model", "Qwen/Qwen3-0.7B", *more]) == 1
    assert [name for name, _ in asked] == ["grid-Qwen3-0.6B", "grid-Qwen3-0.7B"]
    assert all(seconds <= 540 - LAST_STEP - study.QUIT for _, seconds in asked)
    main(["--study", "--model", "one", *more], begin=time.monotonic() - 100)  # importing took long
    assert asked[-1][1] <= 440 - LAST_STEP - study.QUIT


def test_packed_scores_alone_give_the_tables(tmp_path):
    files = {
        "metrics.json": {"a": "b"},
        "predictions/tell.jsonl": [{"hash": "h", "answer": "x", "scores": {"em": 1.0}}],
    }
    assert study.without_texts(files) == {
        "metrics.json": {"a": "b"},
        "predictions/tell.jsonl": [{"hash": "h", "scores": {"em": 1.0}}],
    }


def test_processes_by_cores_and_memory(monkeypatch):
    monkeypatch.setattr(study, "cores", lambda: 12)
    asked = []

    def smi(command, **options):
        asked.append(command)
        return SimpleNamespace(stdout="81920, 40960\n")

    monkeypatch.setattr(subprocess, "run", smi)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert study.workers_for("cpu", 6) == 12
    assert (
        study.workers_for("cuda", 6) == 6 and study.workers_for("cuda", 1) == 12 and study.workers_for("cuda", 99) == 1
    )
    assert {command[command.index("-i") + 1] for command in asked} == {"3"}  # the card that the processes will see


@pytest.mark.parametrize("stdout", [None, "", "No devices were found\n"])
def test_processes_where_the_memory_is_unknown(monkeypatch, capsys, stdout):
    def smi(*args, **options):
        if stdout is None:
            raise FileNotFoundError("nvidia-smi")
        return SimpleNamespace(stdout=stdout)

    monkeypatch.setattr(study, "cores", lambda: 12)
    monkeypatch.setattr(subprocess, "run", smi)
    assert study.workers_for("cuda", 6) == 4
    assert "does not tell the card's memory: 4 processes" in capsys.readouterr().out


def test_the_service_for_several_processes_is_started_and_ended(monkeypatch, tmp_path):
    told = []

    def run(command, **options):
        told.append((command[1:], options.get("input")))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study, "MPS", tmp_path / "control")
    monkeypatch.setattr(study.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(subprocess, "run", run)
    with study.multi_process_service("cuda") as shared:
        assert shared and told == [(["-d"], None)]
    assert told[1:] == [([], "quit\n")]
    (tmp_path / "control").touch()  # another's
    with study.multi_process_service("cuda") as shared:
        assert shared
    with study.multi_process_service("cpu") as shared:
        assert not shared
    assert len(told) == 2


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("control", 30), PermissionError("no")])
def test_a_service_that_does_not_start_is_done_without(monkeypatch, tmp_path, capsys, error):
    def run(command, **options):
        raise error

    monkeypatch.setattr(study, "MPS", tmp_path / "control")
    monkeypatch.setattr(study.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(subprocess, "run", run)
    with study.multi_process_service("cuda") as shared:
        assert not shared
    assert "does not start" in capsys.readouterr().err


@pytest.mark.parametrize("text, rate", [("=7e-4", "7e-4"), ("", "0.001")])
def test_a_model_and_its_rate(tiny_model, text, rate):
    name = str(tiny_model("llama"))
    assert study._model(name + text)[:2] == (name, rate)
