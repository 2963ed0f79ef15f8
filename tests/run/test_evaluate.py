"""`tell eval`: a finished run scored again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tell
from run.runs import EXAMPLES, config_of, read
from tell.errors import TellError
from tell.files import read_jsonl
from tell.progress import Silent


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> tuple[Path, Path]:
    """(run folder, folder of its own copies of the data)."""
    root = tmp_path_factory.mktemp("eval")
    shutil.copytree(EXAMPLES / "reviews", root / "data")
    data = {"data": str(root / "data/train.jsonl"), "test": str(root / "data/test.jsonl")}
    config = config_of(
        tiny_model("qwen3"),
        root / "run",
        example="reviews",
        task=data,
        eval={"arms": ["base", "icl", "sft", "tell", "tell-anchor"]},
        generate={"max_new_tokens": None},
    )
    return tell.tune(config).root, root / "data"


def test_same_numbers_again(run):
    """Same arms, seed and rows: the numbers and answers of the run itself, in the same shape."""
    root, _ = run
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    metrics, again = read(root / "metrics.json"), tell.evaluate(root)
    assert again == json.loads(json.dumps(metrics))
    for arm in metrics["arms"]:
        assert read_jsonl(root / f"predictions/eval/{arm}.jsonl") == read_jsonl(root / f"predictions/{arm}.jsonl")
    assert {path: path.read_bytes() for path in before} == before


def test_some_arms_rows_and_decoding(run):
    root, _ = run
    found = tell.evaluate(root, arms=["tell", "base"], rows=3, overrides=["generate.greedy=true", "seed=1"])
    assert list(found["arms"]) == ["tell", "base"] and list(found["differences"]) == ["tell - base"]
    assert found["arms"]["tell"]["accuracy"]["n"] == 3
    rows = read_jsonl(root / "predictions/eval/tell.jsonl")
    assert {row["hash"] for row in rows} < set(read(root / "split.json")["test"])
    other = ["generate.greedy=true", "seed=2", "generate.batch_size=1"]
    assert tell.evaluate(root, arms=["tell"], rows=3, overrides=other)["arms"]
    short = tell.evaluate(root, arms=["tell"], overrides=["generate.max_new_tokens=1"])
    assert short["arms"] and all(row["tokens"] <= 1 for row in read_jsonl(root / "predictions/eval/tell.jsonl"))


def test_another_test_file(run, tmp_path):
    root, _ = run
    other = tmp_path / "other.jsonl"
    rows = [{"text": f"The {word} broke at once.", "label": "negative", "mood": 1} for word in ("lamp", "kettle")]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    display = Silent()
    found = tell.evaluate(root, arms=["tell", "icl"], test=str(other), display=display)
    assert display.notes == ["other.jsonl: columns not used: mood"]
    assert found["arms"]["tell"]["accuracy"]["n"] == 2
    assert [row["origin"] for row in read_jsonl(root / "predictions/eval/icl.jsonl")] == [
        "other.jsonl:1",
        "other.jsonl:2",
    ]


def test_rows_that_are_gone(run, tmp_path):
    root, data = run
    kept = (data / "test.jsonl").read_text(encoding="utf-8")
    hidden = data.with_name("hidden")
    try:
        lines = kept.splitlines()
        (data / "test.jsonl").write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
        with pytest.raises(TellError, match=r"of the run's 5 test rows are no longer.*--test"):
            tell.evaluate(root, arms=["tell"])
        (data / "test.jsonl").write_text(kept, encoding="utf-8")
        data.rename(hidden)
        with pytest.raises(TellError, match=r"test\.jsonl"):
            tell.evaluate(root, arms=["tell"])
        # with other test rows, only the arm that shows training rows needs them
        other = str(hidden / "test.jsonl")
        assert tell.evaluate(root, arms=["tell", "base"], test=other)["arms"]["tell"]["accuracy"]["n"] == 24
        with pytest.raises(TellError, match=r"train\.jsonl"):
            tell.evaluate(root, arms=["icl"], test=other)
    finally:
        if hidden.exists():
            hidden.rename(data)
        (data / "test.jsonl").write_text(kept, encoding="utf-8")


def test_what_is_refused(run, tmp_path):
    root, _ = run
    with pytest.raises(TellError, match="no adapter for the arm general"):
        tell.evaluate(root, arms=["general"])
    with pytest.raises(TellError, match="unknown arm"):
        tell.evaluate(root, arms=["best"])
    with pytest.raises(TellError, match=r"train.* has no effect on scoring"):
        tell.evaluate(root, overrides=["train.lora_r=2"])
    with pytest.raises(
        TellError, match=r"eval.benchmarks has no effect on scoring. Of eval, answer_loss, arms, bleurt"
    ):
        tell.evaluate(root, overrides=["eval.benchmarks=[gsm8k]"])
    with pytest.raises(TellError, match="no such run folder"):
        tell.evaluate(tmp_path / "nowhere")


DAMAGED = {
    "findings.json": ["", "[]", "{}", '{"kind": 3, "answer_limit": 5}', '{"kind": {"name": "label"}}'],
    "split.json": ["{", "[]", "{}", '{"train": 5, "test": []}', '{"train": [], "test": [3]}'],
    "anchor.json": [
        "",
        "[]",
        '{"text": 5, "place": "user", "origin": "hand"}',
        '{"text": "x", "place": "up", "origin": 1}',
    ],
    "schema.json": ["[]", "{"],
    "metrics.json": ["[]", "{"],
    "plan.json": ["[]", "{}", '{"model": 5}', '{"model": {"thinking": "x"}}'],
    "adapter/adapter_config.json": ["", "[]", '{"r": "x"}'],
    "run.yaml": ["", "[]", "a: [", "seed: {}", "&a [*a]"],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_of_a_run_are_named(name, run, tmp_path):
    root, _ = run
    copy = shutil.copytree(root, tmp_path / "copy")
    if name == "schema.json":
        findings = read(copy / "findings.json")
        findings["kind"]["name"] = "json"
        (copy / "findings.json").write_text(json.dumps(findings))
    for text in DAMAGED[name]:
        (copy / name).write_text(text)
        with pytest.raises(TellError, match=Path(name).name):
            tell.evaluate(copy, arms=["tell"], rows=1)
