"""The prepared run for a GPU, rehearsed on a CPU."""

from __future__ import annotations

import json

import pytest
from bench.gpu.__main__ import STAGES, main

QUICK = "facts,attention,equal,resume,train,memory,decode,merge,peers,profile"


def test_rehearsal_on_a_cpu(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--device", "cpu", "--tiny", "--stages", QUICK]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["stages"]) == list(result["seconds"]) == QUICK.split(",")
    assert all(good for _, _, good in result["findings"]) and not any("error" in s for s in result["stages"].values())
    assert result["stages"]["resume"]["float32"] == {"equal": True, "cosine": pytest.approx(1.0)}
    assert set(result["stages"]["merge"]) == {"chosen", "merged", "beside"}
    trained = result["stages"]["train"]
    assert trained["tiny: tell"]["tokens_s"] > 0 < trained["tiny: tell, fast off"]["loss"]
    assert len(result["stages"]["peers"]) == 3 and all(x["tokens_s"] > 0 for x in result["stages"]["peers"].values())
    assert result["ratios"]["tiny"] > 0 and result["stages"]["memory"]["tiny"]["predicted_gb"] > 0
    assert result["stages"]["decode"]["tiny transformers"]["first_16_tokens_equal"] > 0
    shown, goals = capsys.readouterr().out.splitlines(), (tmp_path / "goals.md").read_text().splitlines()
    assert shown == [*shown[: len(result["findings"])], *goals] and len(goals) == len(result["goals"]) + 2
    verdicts = {goal["name"]: goal["verdict"] for goal in result["goals"]}
    assert verdicts["8 steps, fp32 against CPU fp32"] == "accepted" and verdicts["135M LoRA bf16"] == "not measured"


def test_a_stage_that_fails_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fail(run):
        raise RuntimeError("no kernel\nmore of it")

    monkeypatch.setitem(STAGES, "equal", fail)
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--stages", "equal,merge"]
    assert main(arguments) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["stages"]["equal"]["error"] == "RuntimeError: no kernel\nmore of it"
    assert ["equal", "RuntimeError: no kernel", False] in result["findings"] and "chosen" in result["stages"]["merge"]


def test_nothing_begins_after_the_deadline(tmp_path):
    assert main(["--out", str(tmp_path), "--device", "cpu", "--tiny", "--stages", "train", "--deadline", "0"]) == 0
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--stages", "trian"])
