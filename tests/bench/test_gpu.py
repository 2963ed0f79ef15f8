"""The prepared run for a GPU, rehearsed on a CPU."""

from __future__ import annotations

import json

import pytest
import torch
from bench.gpu import adapters, checks, goals, runners, speed
from bench.gpu import run as run_of_gpu
from bench.gpu.__main__ import STAGES, main
from bench.gpu.goals import BIG, SMALL
from bench.gpu.run import Run

QUICK = "facts,attention,equal,resume,train,memory,decode,merge,profile,capture,peers,parts"


def test_rehearsal_on_a_cpu(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--device", "cpu", "--tiny", "--stages", QUICK]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["stages"]) == list(result["seconds"]) == QUICK.split(",")
    assert all(good for _, _, good in result["findings"]) and not any("error" in s for s in result["stages"].values())
    assert result["stages"]["resume"]["float32"] == {"equal": True, "cosine": pytest.approx(1.0)}
    assert set(result["stages"]["merge"]["tiny"]) == {"chosen", "merged", "beside"}
    trained = result["stages"]["train"]
    assert trained["tiny: tell"]["tokens_s"] > 0 < result["stages"]["parts"]["tiny: tell, fast off"]["loss"]
    assert "skipped" in result["stages"]["capture"]
    applied = result["stages"]["merge"]["tiny"]
    assert [applied[way]["way"] for way in ("merged", "beside")] == ["merged", "beside"]
    assert all(way["tokens_s"] > 0 and way["how"] for way in applied.values())
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
    assert ["equal", "RuntimeError: no kernel", False] in result["findings"] and "chosen" in result["stages"]["merge"][
        "tiny"
    ]


def test_one_error_leaves_the_rest_of_its_stage(tmp_path, monkeypatch):
    """A format, a peer, a size and a way of merging that fail: what was measured before and after is kept."""
    from tell.decode import engine
    from tell.train import lora

    train, applied, calls = runners.tell, engine.adapter_applied, []

    def tell(run, model, rows, plan, settings):
        if model.dtype == torch.float32 and calls:
            raise RuntimeError("no room for fp32")
        calls.append(1)
        return train(run, model, rows, plan, settings)

    def merged_fails(model, folder):
        if lora.is_merged(model, []):
            raise RuntimeError("no room for copies")
        return applied(model, folder)

    def no_peer(*args):
        raise RuntimeError("no room for the peer")

    run = Run(tmp_path, "cpu", True, ["tiny", "no such size"], 8, 512, 480)
    monkeypatch.setattr(runners, "tell", tell)
    monkeypatch.setattr(speed, "_transformers", no_peer)
    monkeypatch.setattr(engine, "adapter_applied", merged_fails)
    found = {stage.__name__: stage(run) for stage in (checks.equal, adapters.merge, speed.decode)}
    assert found["equal"]["float32"] == {"error": "RuntimeError: no room for fp32"}
    assert found["equal"]["bfloat16"]["loss_gap"] < 1e-2
    assert found["decode"]["tiny tell"]["tokens_s"] > 0 and "error" in found["decode"]["tiny transformers"]
    assert found["decode"]["no such size tell"] == {"error": "KeyError: 'no such size'"}
    merged = found["merge"]["tiny"]
    assert "error" in merged["chosen"] and "error" in merged["merged"] and merged["beside"]["apply_s"] > 0
    bad = {name for name, _, good in run.findings if not good}
    assert {"float32", "no such size tell", "merged"} <= bad and "tiny transformers" not in bad  # peers may fail
    assert json.loads((tmp_path / "result.json").read_text())["stages"] == found


def test_skipped_steps_have_no_norm():
    def timed(norms, losses=(2.0, 1.0)):
        return runners.Timed(0.0, losses=list(losses), norms=norms, adapter=torch.ones(3))

    found = checks.compared(timed([None, 1.1]), timed([3.0, 1.0]))
    assert found["norm_gap"] == pytest.approx(0.1) and found["skipped"] == 1 and found["loss_gap"] == 0
    with pytest.raises(ValueError, match="every step was skipped"):
        checks.compared(timed([None, None]), timed([3.0, 1.0]))
    with pytest.raises(ValueError, match="not finite"):
        checks.compared(timed([3.0, 1.0], (2.0, float("nan"))), timed([3.0, 1.0]))


def test_the_big_model_comes_first(tmp_path, monkeypatch):
    """First, for its adapter is what the goals are about, whatever the order of the sizes."""
    made = []
    for size in (BIG, SMALL):
        monkeypatch.setitem(run_of_gpu.SIZES, size, run_of_gpu.SIZES["tiny"])
    monkeypatch.setattr(
        adapters, "make_model", lambda size, *rest: made.append(size) or run_of_gpu.make_model(size, *rest)
    )
    for sizes in ([BIG, SMALL], [SMALL, BIG]):
        stages = {"merge": adapters.merge(Run(tmp_path, "cpu", True, sizes, 8, 512, 480))}
        judged = {goal["name"]: goal["value"] for goal in goals.judged(stages)}
        assert judged["applying an 8B adapter"] == stages["merge"][BIG]["chosen"]["apply_s"]
    assert made == [BIG, SMALL] * 2
    other = {"merge": {SMALL: {"chosen": {"apply_s": 0.1, "more_gb": 0.1}}}}
    assert {goal["verdict"] for goal in goals.judged(other) if goal["name"] == "applying an 8B adapter"} == {
        "not measured"
    }


def test_nothing_begins_after_the_deadline(tmp_path):
    assert main(["--out", str(tmp_path), "--device", "cpu", "--tiny", "--stages", "train", "--deadline", "0"]) == 0
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--stages", "trian"])
