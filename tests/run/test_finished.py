"""What a finished run of every arm holds, and that it comes out the same again."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tell
from homes import home_with_kernels
from run.runs import ALL_ARMS, FILES, check_anchor_and_counts, comparable, is_number, read
from tell.anchor.anchor import Anchor
from tell.files import read_jsonl
from tell.mix.manifest import read_manifest
from tell.names import ARMS
from tell.parts import PARTS
from tell.run.claim import read_run_config
from tell.run.general_rows import read_general
from tell.run.task import load_task

TRAINED = [arm for arm in ALL_ARMS if ARMS[arm].mixture]  # of the finished run


def test_every_file_is_there(finished):
    folder, config = finished
    for name in (*FILES, "schema.json"):
        assert (folder.root / name).stat().st_size > 0, name
    for arm in ("sft", "sft-matched", "general"):
        assert (folder.arms / arm / "adapter_model.safetensors").exists()
        assert folder.losses(arm).exists() and any((folder.logs / arm).iterdir())
        assert not (folder.arms / arm / "checkpoint").exists()
    status = folder.read_status()
    assert (status["state"], status["stage"]) == ("done", "done")
    assert 0 < status["seconds"] <= read(folder.findings)["seconds"] + 5
    assert read_run_config(folder) == config
    assert [path.name for path in folder.root.rglob(".*")] == [folder.lock.name]  # nothing half-written


def test_metrics_have_the_documented_shape(finished):
    folder, _ = finished
    metrics = read(folder.metrics)
    parts = {"task", "arms", "differences", "forgetting", "eval", "mixture", "train", "failed", "same", "readout"}
    assert set(metrics) == parts and metrics["failed"] == metrics["same"] == {}
    assert metrics["task"] == {"kind": "json", "primary": "field_accuracy"}
    assert list(metrics["arms"]) == ALL_ARMS
    for numbers in metrics["arms"].values():
        assert is_number(numbers["schema_adherence"]) and numbers["schema_adherence"]["n"] == 5
    others = [arm for arm in ALL_ARMS if arm != "tell"]
    pairs = {f"tell - {arm}" for arm in others} | {f"{arm} - base" for arm in others if arm != "base"}
    pairs |= {f"{one} - {other}" for part in PARTS for one, other in part.pairs if {one, other} <= {*ALL_ARMS}}
    assert set(metrics["differences"]) == pairs
    assert {row["rows"] for row in metrics["readout"]} == {6}
    for name, numbers in metrics["differences"].items():
        a, b = name.split(" - ")
        values = [metrics["arms"][arm]["schema_adherence"]["value"] for arm in (a, b)]
        assert numbers["schema_adherence"]["value"] == pytest.approx(values[0] - values[1])
        assert is_number(numbers["schema_adherence"])
    train = metrics["train"]
    assert list(train["arms"]) == ["tell", *(arm for arm in TRAINED if arm != "tell")]
    for numbers in train["arms"].values():
        assert numbers["flops"] > 0 and numbers["seconds"] > 0 and math.isfinite(numbers["validation_loss"])
    assert {key: train[key] for key in ("steps", "tokens", "flops")} == {
        key: train["arms"]["tell"][key] for key in ("steps", "tokens", "flops")
    }
    assert train["steps"] == 6 and train["arms"]["sft-matched"]["steps"] == 6  # 12 + 10 rows, 4 a step
    assert train["arms"]["sft"]["steps"] == 2 and train["arms"]["general"]["steps"] == 3


def test_forgetting_before_and_after(finished):
    folder, _ = finished
    found = read(folder.metrics)["forgetting"]
    assert found["sets"]["probe"]["in_mix_source"] is False and found["sets"]["probe"]["rows"] == 4
    assert found["sets"]["general held out"] | {"origin": ""} == {"origin": "", "rows": 4, "in_mix_source": True}
    for arm in ("base", *TRAINED):
        assert all(is_number(found["arms"][arm][name]["loss"]) for name in ("probe", "general held out"))
        assert is_number(found["arms"][arm]["probe"]["task_format"])
    for name in ("tell - base", "sft - base", "tell - sft"):
        a, b = name.split(" - ")
        gap = found["differences"][name]["probe"]["loss"]["value"]
        assert gap == pytest.approx(
            found["arms"][a]["probe"]["loss"]["value"] - found["arms"][b]["probe"]["loss"]["value"], abs=2e-6
        )
    assert found["arms"]["tell"]["probe"]["loss"]["value"] != found["arms"]["base"]["probe"]["loss"]["value"]
    assert [set(row) for row in found["answers"]] == [{"prompt", "reference", "base", *TRAINED}] * 2


def test_held_out_rows_are_not_in_the_mix(finished):
    folder, config = finished
    task = load_task(config)
    general = read_general(task)
    held = {str(key) for key in general.table.hashes[general.held_out]}
    mixed = {row["hash"] for row in read_manifest(folder.manifest).to_pylist() if row["source"] == "general"}
    assert len(held) == 4 and len(mixed) == 10 and not held & mixed


def test_anchor_and_counts(finished):
    folder, config = finished
    check_anchor_and_counts(folder, config, Anchor.load(folder.anchor))


def test_predictions_are_paired_and_scored(finished):
    folder, _ = finished
    hashes = read(folder.split)["test"]
    base = read_jsonl(folder.prediction("base"))
    for arm in ALL_ARMS:
        rows = read_jsonl(folder.prediction(arm))
        assert [row["hash"] for row in rows] == hashes
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in base]
        for row in rows:
            assert set(row) - {"why"} == {
                *("hash", "origin", "prompt", "reference", "answer", "finish", "tokens", "scores")
            }
            assert row["finish"] in ("stop", "length") and row["tokens"] <= 8
            assert row["scores"]["schema_adherence"] in (0.0, 1.0)
    answers = {arm: [row["answer"] for row in read_jsonl(folder.prediction(arm))] for arm in ALL_ARMS}
    assert answers["tell"] != answers["base"] and answers["tell"] != answers["tell-anchor"]
    assert answers["base"] != answers["base+anchor"] != answers["icl"]


def test_adapter_loads_in_plain_peft(finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, config = finished
    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    tuned = PeftModel.from_pretrained(model, str(folder.adapter))
    assert sum(parameter.abs().sum() for name, parameter in tuned.named_parameters() if "lora_B" in name) > 0
    notes = read(folder.adapter / "tell.json")
    assert notes["anchor"]["text"] == "Sort this mail." and notes["base_model"] == config.model.name
    assert read(folder.adapter / "adapter_config.json")["base_model_name_or_path"] == config.model.name


def test_report_tells_of_the_run(finished):
    folder, _ = finished
    page = folder.report.read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html") and "Sort this mail." in page
    assert "tell tune all" in page


def test_findings(finished):
    folder, _ = finished
    found = read(folder.findings)
    assert found["data"]["layout"] == "prompt/completion" and found["split"]["train"] == 6
    assert found["test"]["rows"] == 108 and found["split"]["test"] == 5
    assert found["kind"]["name"] == "json" and found["kind"]["schema_inferred"] is False
    assert found["overlap"]["general_test"] == {"exact": 0, "near": 0, "pairs": []}
    assert found["notices"] == [
        "general.jsonl: columns not used: category",
        "the readout of category, urgency, sentiment, order_id is not used: it tells no more than the shares of the "
        "values do",
        "icl: 2 examples fit into the context",
        "icl-readout: 2 examples fit into the context",
    ]
    assert found["machine"]["dtype"] == "fp32" and found["answer_limit"] == 8


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_same_configuration_same_bytes(finished, home, tmp_path):
    """In another process with another hash seed: the same manifest, adapter and numbers."""
    folder, config = finished
    again = config.model_copy(update={"out": str(tmp_path / "again")})
    code = "import sys, torch, tell; torch.set_num_threads(1); tell.tune(tell.load_config(sys.argv[1]))"
    (tmp_path / "run.yaml").write_text(again.to_yaml(), encoding="utf-8")
    env = {**os.environ, "TELL_HOME": str(home_with_kernels(home / "other")), "PYTHONHASHSEED": "4711"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.yaml")], check=True, env=env, timeout=300)
    other = type(folder)(tmp_path / "again")
    assert digest(other.manifest) == digest(folder.manifest)
    for place in ("adapter", "arms/sft-matched", "arms/general"):
        name = f"{place}/adapter_model.safetensors"
        assert digest(other.root / name) == digest(folder.root / name), place
    assert comparable(read(other.metrics)) == comparable(read(folder.metrics))


def test_another_seed_is_another_run(finished, tmp_path):
    folder, config = finished
    update = {"out": str(tmp_path / "run"), "seed": 8, "eval": config.eval.model_copy(update={"arms": ("tell",)})}
    other = tell.tune(config.model_copy(update=update))
    assert digest(other.manifest) != digest(folder.manifest)
    name = "adapter/adapter_model.safetensors"
    assert load_file(other.root / name).keys() == load_file(folder.root / name).keys()
    assert digest(other.root / name) != digest(folder.root / name)
