"""Runs whose answers are labels, one or several: from the file to the report, and again in `tell eval` and chat."""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np
import pytest

import tell
from run.runs import config_of, read
from tell.cli.main import run as command
from tell.data.label_text import FORMS
from tell.files import read_jsonl
from tell.readout.readout import Readout
from tell.report.arm_rows import arm_rows, rescorer
from tell.report.read_run import read_run
from tell.studies.measured import CellReader

LABELS = ("billing", "delivery", "refund", "urgent")
ARMS = ["base", "tell", "tell-free", "sft-matched"]
HOSTILE = "<b>x</b>"


def write_rows(path: Path, form: str, n: int, seed: int) -> None:
    """Rows whose labels are the words of their prompt; JSON lists in a column of lists, others as text."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(n):
        found = [label for label in (*LABELS, HOSTILE) if rng.random() < 0.4] or ["urgent"]
        prompt = f"{i} {' '.join(word.strip('<b>/') for word in found)} please"
        cell = found if form == "json" else FORMS[form].join(found)
        lines.append(json.dumps({"text": prompt, "labels": cell}))
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module", params=["json", "semicolons"])
def finished_lists(request, tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    write_rows(root / "train.jsonl", request.param, 40, 0)
    write_rows(root / "test.jsonl", request.param, 12, 1)
    task = {"data": str(root / "train.jsonl"), "test": str(root / "test.jsonl"), "rows": 24, "test_rows": 10}
    config = config_of(
        tiny_model("llama"),
        root / "run",
        example="reviews",
        task=task,
        anchor={"text": "List the labels."},
        generate={"max_new_tokens": 90, "greedy": True, "repetition_penalty": 1.0, "closed": "fused"},
        eval={"arms": ARMS, "bootstrap": 100},
    )
    return tell.tune(config), config, request.param


def test_from_the_file_to_the_report(finished_lists):
    folder, _, form = finished_lists
    kind, metrics = read(folder.findings)["kind"], read(folder.metrics)
    assert (kind["name"], kind["form"]) == ("labels", form)
    assert kind["labels"] == sorted((*LABELS, HOSTILE))
    assert metrics["task"] == {"kind": "labels", "primary": "sample_f1"}
    assert set(metrics["arms"]["tell"]) == {"sample_f1", "exact_set", "micro_f1", "macro_f1", "valid_labels"}
    assert [row["field"] for row in metrics["readout"]] == ["labels[]"]
    assert Readout.load(folder.readout).fields[0].field.separator == FORMS[form].separator
    rows = read_jsonl(folder.prediction("tell"))
    for row in rows:  # decided: a tiny random model would never list the labels
        found = FORMS[form].split(row["answer"])
        assert row["finish"] == "stop" and set(found) <= set(kind["labels"]) and len(set(found)) == len(found)
    assert metrics["arms"]["tell"]["valid_labels"]["value"] == 1 > metrics["arms"]["tell-free"]["valid_labels"]["value"]
    table = metrics["labels"]["arms"]["tell"]
    assert sum(row["support"] for row in table) == sum(len(FORMS[form].split(row["reference"])) for row in rows)
    page = folder.report.read_text(encoding="utf-8")
    assert 'id="labels"' in page and "Confusion matrix" not in page and "<b>x" not in page
    assert "to everything gives" in html.unescape(page) and "constant answer" in page


def test_the_answers_in_training_are_those_of_the_file(finished_lists):
    folder, config, form = finished_lists
    rows = [json.loads(line) for line in Path(config.task.test).read_text(encoding="utf-8").splitlines()]
    given = {row["text"]: row["labels"] if form != "json" else json.dumps(row["labels"]) for row in rows}
    for row in read_jsonl(folder.prediction("tell")):
        assert row["reference"] == given[row["prompt"]]


def test_eval_and_chat(finished_lists, tmp_path, capsys):
    folder, _, form = finished_lists
    again = tell.evaluate(folder.root)
    metrics = read(folder.metrics)
    for key in ("arms", "differences", "labels", "baseline"):
        assert again[key] == metrics[key]
    one = tmp_path / "single.jsonl"  # a test file in which each row has one label is in the form of the run
    cells = [["urgent"], ["refund"], ["urgent"]] if form == "json" else ["urgent", "refund", "urgent"]
    one.write_text("\n".join(json.dumps({"text": f"{i} row", "labels": cell}) for i, cell in enumerate(cells)))
    assert (
        command(["eval", str(folder.root), "--arms", "tell", "--test", str(one), "--set", "generate.closed=readout"])
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "constant answer" in out and "tell, lowest F1" in out and "to everything gives 66.7 %" in " ".join(out.split())
    )
    references = {row["reference"] for row in read_jsonl(folder.evaluated("tell"))}
    assert references == ({'["urgent"]', '["refund"]'} if form == "json" else {"urgent", "refund"})
    session = tell.chat(folder.root)
    try:
        said = "".join(session.stream("billing refund please"))
    finally:
        session.close()
    assert set(FORMS[form].split(said)) <= {*LABELS, HOSTILE}


def test_kept_answers_are_scored_again_as_in_the_run(finished_lists):
    """For pairs of runs, `tell add`, gates and studies; metrics of the whole corpus are had from the answers alone."""
    folder, _, _ = finished_lists
    entries, run = read(folder.metrics)["arms"]["tell"], read_run(folder)
    values = {name: pytest.approx(entry["value"], abs=1e-6) for name, entry in entries.items()}
    again = rescorer(run)(run.predictions["tell"])
    assert {name: metric.value for name, metric in again.items()} == values and values["micro_f1"] != 0
    for metrics in (arm_rows(run, "tell").metrics, CellReader.open(folder.root).arm("tell").metrics):
        assert {name: metric.value for name, metric in metrics.items()} == values


def test_single_labels_get_tables_and_their_scores_stay(tiny_model, tmp_path):
    config = config_of(tiny_model("llama"), tmp_path / "run", example="reviews", task={"test_rows": 12})
    folder = tell.tune(config)
    metrics = read(folder.metrics)
    assert metrics["task"]["kind"] == "label" and "form" not in read(folder.findings)["kind"]
    rows = read_jsonl(folder.prediction("tell"))
    table = {row["label"]: row for row in metrics["labels"]["arms"]["tell"]}
    for label, row in table.items():
        own = [r for r in rows if r["reference"] == label]
        assert row["support"] == len(own) == sum(row["answers"].values()) + row["none"] + row["others"]
        assert row["answers"].get(label, 0) == sum(r["scores"]["accuracy"] for r in own)
    most = max(metrics["labels"]["arms"]["tell"], key=lambda row: row["support"])
    assert metrics["baseline"]["scores"]["accuracy"]["value"] == pytest.approx(most["support"] / 12, abs=1e-6)
    page = folder.report.read_text(encoding="utf-8")
    assert "Confusion matrix" in page and 'class="grid heat"' in page
