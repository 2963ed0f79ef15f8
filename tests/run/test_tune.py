"""The whole way from file to report on tiny random models: families, arms, data, and runs that fail."""

from __future__ import annotations

import json
import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

import tell
from run.runs import EXAMPLES, FILES, PROBE, check_anchor_and_counts, config_of, is_number, read, trained_rows
from tell.anchor.anchor import Anchor
from tell.cli.tables import show_metrics
from tell.data.sources import load
from tell.errors import TellError
from tell.folder import RunFolder
from tell.mix.manifest import read_manifest
from tell.progress import Silent
from tell.report.page import STATES
from tell.rows.template import ChatTokenizer
from tell.run.task import limit_task, load_task, task_table
from tell.score.verdict import verdict

FAMILIES = [
    # family, example, kind, sections
    ("qwen3", "reviews", "label", {"eval": {"arms": ["base", "general", "tell"]}}),
    ("gemma2", "titles", "text", {"anchor": {"place": "system"}, "eval": {"arms": ["base+anchor", "sft", "tell"]}}),
    ("phi3", "support", "json", {"anchor": {"text": "auto"}, "mix": {"repeat": 1, "order": "shuffle"}}),
]


@pytest.mark.parametrize(("family", "example", "kind", "sections"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_families_and_kinds(tiny_model, tmp_path, family, example, kind, sections):
    config = config_of(tiny_model(family), tmp_path / "run", example=example, **sections)
    display = Silent()
    folder = tell.tune(config, display=display)
    metrics = read(folder.metrics)
    assert metrics["task"]["kind"] == kind and list(metrics["arms"]) == list(config.eval.arms)
    for name in FILES:
        assert (folder.root / name).stat().st_size > 0, name
    assert (folder.root / "schema.json").exists() == (kind == "json")
    anchor = Anchor.load(folder.anchor)
    assert anchor.place == "user"
    check_anchor_and_counts(folder, config, anchor)
    primary = metrics["arms"]["tell"][metrics["task"]["primary"]]
    assert primary["n"] == 5 and is_number(primary)
    assert "base" in metrics["forgetting"]["arms"] and "tell - base" in metrics["forgetting"]["differences"]
    computed = read(folder.findings)["computed"]
    assert computed["decoding"].startswith("TELL's own engine") and computed["base weights"] == "not quantised"
    said = " ".join(read(folder.findings)["notices"])
    assert ("no system role" in said) == (family == "gemma2")
    if family == "phi3":
        candidates = read(folder.anchor)["candidates"]
        assert anchor.text in [c["text"] for c in candidates] and '"category"' in anchor.text + candidates[0]["text"]


def test_a_model_without_chat_template(tiny_model, tmp_path):
    config = config_of(
        tiny_model("llama", template=False), tmp_path / "run", example="reviews", eval={"arms": ["tell"]}
    )
    folder = tell.tune(config)
    assert "no chat template" in read(folder.findings)["notices"][0]
    assert "no chat template" in folder.report.read_text(encoding="utf-8")
    check_anchor_and_counts(folder, config, Anchor.load(folder.anchor))
    rows = trained_rows(folder, config)
    assert all("### Instruction:" in text and "### Response:" in text for _, _, text in rows)


def test_no_anchor_and_no_general_data(tiny_model, tmp_path):
    config = config_of(
        tiny_model("llama"),
        tmp_path / "run",
        example="titles",
        anchor={"text": "none"},
        general={"source": "none"},
        eval={"forgetting_rows": 0, "arms": ["tell", "base"]},
    )
    folder = tell.tune(config)
    metrics = read(folder.metrics)
    assert metrics["mixture"]["rows"] == {"task": 12} and metrics["mixture"]["ratio"] == 0
    assert metrics["forgetting"] == {} and read(folder.anchor)["text"] == ""
    assert set(read_manifest(folder.manifest)["source"].to_pylist()) == {"task"}


def test_arms_of_the_same_rows_are_one_run(tiny_model, tmp_path):
    """Without general rows TELL is SFT: trained once, and table, verdict and page say so."""
    arms = ["base", "sft-matched", "tell"]
    config = config_of(tiny_model("llama"), tmp_path / "run", general={"source": "none"}, eval={"arms": arms})
    assert list(tell.plan(config)["arms"]) == ["tell"]
    folder = tell.tune(config)
    metrics = read(folder.metrics)
    assert metrics["same"] == {"sft-matched": "tell"} and list(metrics["train"]["arms"]) == ["tell"]
    assert list(metrics["arms"]) == ["base", "tell"] and not folder.arms.exists()
    told = verdict(metrics)
    assert told.startswith("Without general rows this is SFT, not TELL") and "TELL " not in told.partition(": ")[2]
    page = folder.report.read_text(encoding="utf-8")
    assert "one run with sft-matched" in page and "one run: they are trained on the same rows" in page
    stream = StringIO()
    show_metrics(Console(file=stream, width=160), metrics)
    assert re.search(r"sft-matched\s*│?\s*one run with tell", stream.getvalue())


def test_arms_without_tell(tiny_model, tmp_path):
    """`--arms base` trains nothing; `tell-anchor` alone still needs TELL's adapter."""
    model = tiny_model("llama")
    folder = tell.tune(config_of(model, tmp_path / "base", eval={"arms": ["base"]}, general={"source": "self"}))
    metrics = read(folder.metrics)
    assert list(metrics["arms"]) == ["base"] and metrics["differences"] == {} and metrics["train"]["arms"] == {}
    assert not folder.adapter.exists() and not folder.manifest.exists() and metrics["mixture"] == {}
    assert {key: metrics["train"][key] for key in ("arm", "steps", "tokens")} == {"arm": None, "steps": 0, "tokens": 0}
    assert "Mixture" not in folder.report.read_text(encoding="utf-8").split('id="again"')[0]
    assert "loss" in metrics["forgetting"]["arms"]["base"]["probe"]

    folder = tell.tune(config_of(model, tmp_path / "without", eval={"arms": ["icl", "tell-anchor"]}))
    metrics = read(folder.metrics)
    assert set(metrics["train"]["arms"]) == {"tell"} and metrics["train"]["steps"] == 6
    assert list(metrics["differences"]) == ["tell-anchor - icl"]
    assert set(metrics["forgetting"]["arms"]) == {"base", "tell"}
    assert (folder.adapter / "adapter_model.safetensors").exists()
    plan = tell.plan(config_of(model, eval={"arms": ["icl", "tell-anchor"]}))
    assert set(plan["arms"]) == {"tell"} and plan["predicted"]["training_seconds"] > 0


def test_manifest_and_totals_are_of_what_was_trained(tiny_model, tmp_path):
    """Without `tell`, the first trained arm leads: here plain SFT, each task row once and no general row."""
    config = config_of(tiny_model("llama"), tmp_path / "run", eval={"arms": ["base", "sft", "sft-matched"]})
    folder = tell.tune(config)
    metrics, manifest = read(folder.metrics), read_manifest(folder.manifest).to_pylist()
    assert metrics["mixture"]["rows"] == {"task": 6} and metrics["mixture"]["repeat"] == 1
    assert [row["source"] for row in manifest] == ["task"] * 6 and {row["repetition"] for row in manifest} == {0}
    train = metrics["train"]
    assert (train["arm"], train["steps"]) == ("sft", 2) and train["arms"]["sft-matched"]["steps"] == 6
    assert train["tokens"] == train["arms"]["sft"]["tokens"] == sum(row["tokens"] for row in manifest)
    plan = read(folder.plan)
    assert plan["train"]["steps"] == 2 and plan["draw"]["rows"] == 10
    tell.tune(config, resume=True)  # the same is decided again
    assert read(folder.metrics)["train"]["steps"] == 2


@pytest.fixture
def fragile(tiny_model, tmp_path) -> tuple[Path, Path]:
    """A tiny model in which one sign's embedding is not a number, and general data that holds it."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("phi3"), model)
    weights = load_file(model / "model.safetensors")
    sign = ChatTokenizer(model).encode("\u2603")[0]
    weights["model.embed_tokens.weight"][sign] = float("nan")
    assert "lm_head.weight" in weights  # untied: what is written stays a number
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    general = tmp_path / "general.jsonl"
    rows = ({"prompt": f"Say {n}.", "completion": f"{n} \u2603 {n}"} for n in range(12))
    general.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return model, general


def fragile_config(fragile, out: Path, arms: list[str]) -> tell.Config:
    model, general = fragile
    quiet = {"forgetting_rows": 0}
    return config_of(model, out, general={"source": str(general)}, eval={"arms": arms, **quiet})


def test_a_control_arm_that_diverges_is_told_of(fragile, tmp_path):
    config = fragile_config(fragile, tmp_path / "run", ["base", "sft", "general"])
    said: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    folder = tell.tune(config, display=Notes())
    why = "training diverged at step 1 of 3 (loss nan)"
    metrics, notice = read(folder.metrics), f"the arm general failed and is left out: {why}"
    assert metrics["failed"] == {"general": why} and set(metrics["arms"]) == {"base", "sft"}
    assert set(metrics["train"]["arms"]) == {"sft"} and folder.read_status()["state"] == "done"
    assert notice in said and notice in read(folder.findings)["notices"]
    page = folder.report.read_text(encoding="utf-8")
    assert page.count(why) >= 2  # in the verdict and among the notices
    assert verdict(metrics).endswith(f"; tuning on general data alone was not scored ({why}).")
    assert not (folder.arms / "general" / "adapter_model.safetensors").exists()
    written = folder.losses("general").stat().st_mtime_ns
    tell.tune(config, resume=True)
    assert folder.losses("general").stat().st_mtime_ns == written  # not tried again
    assert read(folder.metrics)["failed"] == {"general": why} and notice in read(folder.findings)["notices"]
    assert set(tell.evaluate(folder.root)["arms"]) == {"base", "sft"}


def test_the_leading_arm_that_diverges_ends_the_run(fragile, tmp_path):
    with pytest.raises(TellError, match=r"training diverged.*--lr"):
        tell.tune(fragile_config(fragile, tmp_path / "run", ["base", "sft", "tell"]))
    assert read(tmp_path / "run" / "status.json")["state"] == "failed"
    assert not (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_drop_overlap_removes_rows(tiny_model, tmp_path):
    """A training row and a general row that repeat a test row are reported, and removed where asked."""
    test = [json.loads(line) for line in (EXAMPLES / "reviews/test.jsonl").read_text(encoding="utf-8").splitlines()]
    train = (EXAMPLES / "reviews/train.jsonl").read_text(encoding="utf-8").splitlines()
    copied = {"text": test[0]["text"] + "!", "label": test[0]["label"]}
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join([*train, json.dumps(copied)]) + "\n", encoding="utf-8")
    general = tmp_path / "general.jsonl"
    extra = json.dumps({"instruction": test[1]["text"].upper(), "output": "I see."})
    general.write_text(PROBE.read_text(encoding="utf-8").splitlines()[0] + "\n" + extra + "\n", encoding="utf-8")
    sections = {"general": {"source": str(general), "rows": 1}, "eval": {"arms": ["tell"], "forgetting_rows": 0}}
    task = {"data": str(data), "rows": None, "test_rows": None, "validation_fraction": 0}
    found = {}
    for drop in (False, True):
        given = {**task, "drop_overlap": drop}
        config = config_of(tiny_model("llama"), tmp_path / f"run-{drop}", example="reviews", task=given, **sections)
        folder = tell.tune(config)
        found[drop] = read(folder.findings), read(folder.metrics)["mixture"], tell.plan(config)["mixture"]
        assert found[drop][1] == found[drop][2]
    for facts, _, _ in found.values():
        assert facts["overlap"]["train_test"]["near"] == 1 and facts["overlap"]["general_test"]["near"] == 1
        assert facts["overlap"]["train_test"]["pairs"][0]["a"] == "train.jsonl:25"
    assert [found[drop][0]["overlap"]["dropped"] for drop in (False, True)] == [0, 2]
    assert [found[drop][1]["unique_rows"]["task"] for drop in (False, True)] == [25, 24]


def test_test_rows_given_or_split_off(finished, tiny_model):
    folder, config = finished
    given = load_task(config)
    test = {e.hash for e in load(config.task.test).examples}
    assert set(read(folder.split)["test"]) <= test and not {e.hash for e in given.train} & test
    task = load_task(config_of(tiny_model("llama"), task={"test": None, "test_rows": None}))
    parts = [{e.hash for e in part} for part in (task.train, task.validation, task.test)]
    assert sum(map(len, parts)) == 72 and len(set.union(*parts)) == 72 and len(parts[2]) == 22
    assert task.facts.test is None


def test_task_budgets_are_nested(tiny_model):
    def chosen(**budget) -> tuple[set[str], int]:
        anchor = Anchor("Sort this mail.")
        task = limit_task(load_task(config_of(tiny_model("llama"), task={"rows": None, **budget})), anchor)
        return {e.hash for e in task.train}, int(task_table(task, anchor).unit.sum())

    rows = [chosen(rows=n)[0] for n in (3, 10, 40)]
    assert [len(part) for part in rows] == [3, 10, 40] and rows[0] < rows[1] < rows[2]
    longest = 700
    parts = [chosen(tokens=n) for n in (1500, 6000)]
    assert parts[0][0] < parts[1][0]
    for (_, tokens), budget in zip(parts, (1500, 6000), strict=True):
        assert abs(tokens - budget) < longest


def test_bad_input_leaves_nothing(tiny_model, tmp_path):
    out = tmp_path / "run"
    model = tiny_model("llama")
    for sections, words in (
        ({"general": {"source": "none"}, "eval": {"arms": ["general"]}}, "needs general data"),
        ({"general": {"rows": 0}, "eval": {"arms": ["general", "tell"]}}, "needs general data"),
        ({"mix": {"order": "sorted"}}, "sorted"),
        ({"anchor": {"text": "@nowhere.txt"}}, "nowhere.txt"),
        ({"general": {"source": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"task": {"rows": 5000}}, "5,000"),
        ({"task": {"scorer": "nomodule:f"}}, "nomodule"),
    ):
        with pytest.raises(TellError) as error:
            tell.tune(config_of(model, out, **sections))
        assert words in str(error.value) and "\n" not in str(error.value)
        assert not out.exists()


def test_a_run_is_done_once_its_report_is_written(tiny_model, tmp_path, monkeypatch):
    """The page says of the run what it will be, and a page that fails is no run that is done."""
    import tell.run.tune as page

    config = config_of(tiny_model("llama"), tmp_path / "run", eval={"arms": ["base"]})
    whole = page.write_page
    seen = []

    def looked_at(folder, **options):
        seen.append(folder.read_status()["state"])
        if len(seen) == 1:
            raise OSError("no room")
        return whole(folder, **options)

    monkeypatch.setattr(page, "write_page", looked_at)
    with pytest.raises(OSError, match="no room"):
        tell.tune(config)
    folder = RunFolder(tmp_path / "run")
    assert (folder.read_status()["state"], folder.read_status()["stage"]) == ("failed", "report")
    tell.tune(config, resume=True)
    assert seen == ["running", "running"] and folder.read_status()["state"] == "done"
    text = folder.report.read_text(encoding="utf-8")
    assert all(words not in text for words in STATES.values())
