"""Plans count what a run will do, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import tell
from run.runs import ALL_ARMS, PROBE, config_of, read
from tell.cli.tables import _memory
from tell.data.general import general_source
from tell.mix.prefixes import copied_tokens
from tell.models import machine
from tell.names import ARMS
from tell.run import task as tasks
from tell.run.costs import arm_costs
from tell.run.general_rows import load_general, read_general
from tell.run.plan import describe_plan
from tell.run.prepare import prepare
from tell.run.task import CACHED_ROWS, anchor_of, load_task
from tell.run.time_budget import fit_minutes


def test_plan_is_what_the_run_does(finished):
    folder, config = finished
    planned, done = tell.plan(config), read(folder.plan)
    metrics = read(folder.metrics)
    assert planned["mixture"] == done["mixture"] == metrics["mixture"]
    assert planned["task"] == done["task"] and planned["train"] == done["train"]
    assert set(planned["arms"]) == set(metrics["train"]["arms"]) == {arm for arm in ALL_ARMS if ARMS[arm].mixture}
    for arm, cost in planned["arms"].items():
        trained = metrics["train"]["arms"][arm]
        for key in ("steps", "tokens", "trained_tokens", "flops"):
            assert cost[key] == trained[key], (arm, key)
    assert planned["predicted"]["seconds"] > planned["predicted"]["training_seconds"] > 0
    assert planned["predicted"]["memory_gb"] > 0
    json.dumps(planned)


def test_plan_imports_no_torch(tiny_model, tmp_path):
    config = config_of(tiny_model("llama"), eval={"arms": ALL_ARMS}, anchor={"text": "auto"})
    (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    code = (
        "import sys, tell; tell.plan(tell.load_config(sys.argv[1]));"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.yaml")], check=True, env=env, timeout=120)


def test_many_task_rows_are_tokenised_once(tiny_model, tmp_path, monkeypatch):
    """Planning again reads them back; another anchor, or another row, is another table."""
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    data = tmp_path / "rows.jsonl"
    rows = [json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) for n in range(CACHED_ROWS + 200)]

    def planned(anchor: str, n: int) -> tuple[dict, int]:
        data.write_text("\n".join(rows[:n]), encoding="utf-8")
        task = {"data": str(data), "test": None, "schema": None, "rows": None, "test_rows": 5, "test_fraction": 0.1}
        plan = tell.plan(config_of(tiny_model("llama"), task=task, anchor={"text": anchor}, general={"source": "none"}))
        return plan, len(list((tmp_path / "home" / "rows").iterdir()))

    first, kept = planned("Be brief.", len(rows))
    assert kept == 1 and first["task"]["rows"] > CACHED_ROWS
    assert planned("Be brief.", len(rows)) == (first, 1)
    other, kept = planned("Be very brief, please.", len(rows))
    assert kept == 2 and other["task"]["tokens"] > first["task"]["tokens"]
    assert planned("Be brief.", len(rows) - 1)[1] == 3


def test_plan_says_what_of_the_card_a_run_takes(tiny_model, monkeypatch):
    """Its memory, passes and recomputation, and that a run does not fit, for a GPU that is not there."""
    config = config_of(tiny_model("gemma3"))
    config.model.device = "cuda"
    found = {}
    for free in (23e9, 0.9e9):
        monkeypatch.setattr(tasks, "device_memory", lambda device, free=free: (24e9, free))
        planned = tell.plan(config)
        found[free] = planned["predicted"], [text for text in planned["notices"] if "predicted to need" in text]
    (plenty, no_notice), (_, notice) = found.values()
    assert not no_notice and len(notice) == 1 and "0.9 GB are free on cuda" in notice[0]
    assert plenty["device_memory_gb"] == 24 and plenty["layers"] == 3 and plenty["recompute"] == 0
    assert plenty["micro_tokens"] > 0 and plenty["memory_gb"] < 24
    text = _memory({**plenty, "memory_gb": 21.5, "recompute": 2, "micro_tokens": 2048})
    assert text == "21.5 GB of memory of 24 GB, passes of 2,048 tokens, 2 of 3 layers recomputed"
    assert _memory({"memory_gb": 2.5}) == "2.5 GB of memory"  # of an older plan
    monkeypatch.setattr(tasks, "device_memory", lambda device: None)
    assert tell.plan(config)["predicted"]["device_memory_gb"] is None


def test_free_memory_is_read_once_as_a_run_begins(tiny_model, monkeypatch):
    """What a plan made after loading sees free is what the model has left; and asking a card takes its time."""
    calls = []
    monkeypatch.setattr(tasks, "device_memory", lambda device: calls.append(device) or (24e9, 23e9))
    config = config_of(tiny_model("llama"), max_minutes=60.0)
    task = load_task(config)
    monkeypatch.setattr(machine, "gpu_memory", lambda: pytest.fail("asked again"))
    prepared = prepare(task, anchor_of(config), read_general(task))
    extent, _ = fit_minutes(prepared, minutes=60.0, spent=0.0)
    assert describe_plan(extent.apply(prepared))["predicted"]["device_memory_gb"] == 24 and calls == ["cpu"]


def test_what_a_pass_copies_of_the_prefix(tiny_model):
    """On a GPU attention copies its keys and values for every row behind it; at most for as many as a pass holds."""
    from tell.train.fast.cuda import Layout
    from tell.train.packing import pack_rows
    from tell.train.training_job import step_rows

    config = config_of(tiny_model("llama"), general={"source": str(PROBE), "rows": 9}, train={"batch_size": 16})
    task = load_task(config)
    prepared = prepare(task, anchor_of(config), read_general(task))
    for arm, (tables, mixture) in prepared.mixtures.items():
        found = []
        for step in range(mixture.steps(16)):
            host = pack_rows(step_rows(mixture, tables, step, 16), share_prefix=True, device="cuda")
            copies = Layout.of(host.lengths, host.prefix, host.ahead).copies
            found.append(0 if copies is None else len(copies.token) - len(host.ids))
        assert copied_tokens(mixture, 16, 10**6) == max(found), arm
        assert copied_tokens(mixture, 16, 50) <= copied_tokens(mixture, 16, 10**6)
    assert max(found) > 0 and copied_tokens(mixture, 16, 50) < max(found)


def test_plan_writes_no_run_folder(tiny_model, tmp_path):
    tell.plan(config_of(tiny_model("llama"), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("amount", "value"), [("rows", 17), ("tokens", 900), ("ratio", 1.5)])
def test_amounts_are_met(tiny_model, amount, value):
    plan = tell.plan(config_of(tiny_model("llama"), general={"rows": None, amount: value}))
    mixture = plan["mixture"]
    if amount == "rows":
        assert mixture["rows"]["general"] == 17
    else:
        wanted = value if amount == "tokens" else value * plan["task"]["unit_tokens"]
        assert abs(mixture["unit_tokens"]["general"] - wanted) < 200  # no probe row is longer
    assert mixture["rows"]["task"] == 12 and mixture["tokens"]["task"] == 2 * plan["task"]["tokens"]
    assert plan["train"]["steps"] == -(-sum(mixture["rows"].values()) // 4)
    assert mixture["ratio"] == pytest.approx(mixture["unit_tokens"]["general"] / plan["task"]["unit_tokens"])


def test_without_general_data(tiny_model):
    plan = tell.plan(config_of(tiny_model("llama"), general={"source": "none"}))
    assert plan["general"] is None and plan["mixture"]["rows"] == {"task": 12}


def test_self_written_data_is_estimated(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path))
    config = config_of(tiny_model("llama"), general={"source": "self", "ratio": 20.0, "rows": None})
    plan = tell.plan(config)
    assert plan["general"]["estimated"] and any("estimated" in text for text in plan["notices"])
    assert plan["mixture"]["ratio"] == pytest.approx(20, rel=0.05)
    assert (
        "general"
        not in tell.plan(
            config_of(tiny_model("llama"), eval={"arms": ["base", "sft"]}, general={"source": "self", "rows": 9})
        )["mixture"]["rows"]
    )  # no arm asked for would be trained on it


def test_anchor_to_be_written_is_stood_in_for(tiny_model):
    plan = tell.plan(config_of(tiny_model("gemma2"), anchor={"text": "auto", "place": "system"}))
    assert any("placeholder" in text for text in plan["notices"])
    assert any("no system role" in text for text in plan["notices"])
    by_hand = tell.plan(config_of(tiny_model("gemma2")))
    assert plan["task"]["tokens"] > by_hand["task"]["tokens"]


def test_unit_of_another_tokenizer(tiny_model):
    other = tiny_model("phi3", vocab=300)
    here, there = (tell.plan(config_of(tiny_model("llama"), **more)) for more in ({}, {"tokens": {"unit": str(other)}}))
    assert there["task"]["tokens"] == here["task"]["tokens"]
    assert there["task"]["unit_tokens"] > here["task"]["unit_tokens"]  # a smaller vocabulary cuts finer


@pytest.mark.parametrize("general", [0, 1, 40])
def test_computed_tokens_are_those_of_the_passes(tiny_model, general):
    """Task rows share the anchor also where a step holds general rows."""
    from tell.train.packing import pack, split_packs
    from tell.train.training_job import step_rows

    source = {"source": str(PROBE), "rows": general} if general else {"source": "none"}
    config = config_of(tiny_model("llama"), general=source, task={"rows": 30}, train={"batch_size": 16})
    task = load_task(config)
    prepared = prepare(task, anchor_of(config), read_general(task))
    for arm, (tables, mixture) in prepared.mixtures.items():
        packs = [
            pack(group, share_prefix=True)
            for step in range(mixture.steps(16))
            for group in split_packs(step_rows(mixture, tables, step, 16), 3072, share_prefix=True)
        ]
        computed, given = sum(part.plan.total for part in packs), sum(part.real for part in packs)
        costs = arm_costs(task, mixture)
        assert costs["tokens"] == given
        assert costs["computed_tokens"] == pytest.approx(computed, rel=0.03), arm
        if arm != "general":
            assert costs["computed_tokens"] < 0.93 * given, arm


def test_less_than_a_general_row(tiny_model, tmp_path):
    """The arm that trains on general data alone is left out, and that is said; the rest goes on."""
    general = {"source": str(PROBE), "rows": None, "tokens": 1}
    arms = ["base", "general", "tell"]
    folder = tell.tune(config_of(tiny_model("llama"), tmp_path / "run", eval={"arms": arms}, general=general))
    metrics, found = read(folder.metrics), read(folder.findings)
    assert list(metrics["arms"]) == ["base", "tell"] and metrics["mixture"]["rows"] == {"task": 12}
    assert any("arm general is left out" in text for text in found["notices"])
    assert any("no general row is drawn" in text for text in found["notices"])


def test_no_time_is_refused_and_nothing_is_trained(tiny_model, tmp_path):
    """The method is never given up: too few minutes are refused, by the plan as by the run."""
    config = config_of(tiny_model("llama"), tmp_path / "run", max_minutes=1e-6)
    for verb in (tell.tune, tell.plan):
        with pytest.raises(tell.TellError, match=r"too short.*Use --max-minutes 1,"):
            verb(config)
    assert read(tmp_path / "run/status.json")["state"] == "failed"
    assert not (tmp_path / "run/adapter").exists()


def test_dropped_rows_are_counted(tiny_model):
    plan = tell.plan(config_of(tiny_model("llama"), train={"max_length": 260}, task={"rows": 30}))
    assert 0 < plan["task"]["rows"] < 30
    reasons = [row["reason"] for row in plan["dropped_rows"] if row["origin"].startswith("train.jsonl")]
    assert len(reasons) == 30 - plan["task"]["rows"] and all("longer than max_length 260" in r for r in reasons)
    with pytest.raises(tell.TellError, match=r"train.jsonl:\d+: .* longer than"):
        tell.plan(config_of(tiny_model("llama"), train={"max_length": 260, "too_long": "refuse"}, task={"rows": 30}))


def test_a_plan_from_the_cache_is_the_same(tiny_model, tmp_path, monkeypatch):
    """Layout, columns, rows and notices of general data do not depend on who tokenised them, under which name."""
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    rows = [{"instruction": f"What is {n}?", "output": "" if n == 3 else f"It is {n}.", "mood": "x"} for n in range(40)]
    paths = [tmp_path / "rows.jsonl", tmp_path / "more" / "rows.jsonl"]
    paths[1].parent.mkdir()
    for path in paths:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def planned(path):
        return tell.plan(config_of(tiny_model("llama"), general={"source": str(path), "rows": 5}))

    cold = planned(paths[0])
    assert planned(paths[0]) == cold
    assert any(text.endswith("columns not used: mood") for text in cold["notices"])

    def facts(path):
        task = load_task(config_of(tiny_model("llama"), general={"source": str(path), "rows": 5}))
        return load_general(task, general_source(str(path)), overlap=False).facts

    assert facts(paths[0]) == {"path": str(paths[0]), "layout": "Alpaca instruction/output", "rows": 39} | {
        "columns": {"prompt": "instruction", "answer": "output"}
    }
    assert facts(paths[1]) == facts(paths[0]) | {"path": str(paths[1])}
