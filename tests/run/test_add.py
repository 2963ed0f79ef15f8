"""`tell add`: a run grown by rows, and compared with the one before."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import tell
from run.runs import EXAMPLES, Killer, config_of, read
from tell.cli.main import run as tell_command
from tell.data.sources import load
from tell.errors import Interrupted, TellError
from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.report.arm_rows import keyed
from tell.run.claim import read_run_config
from tell.score.intervals import difference
from tell.score.means import mean_metric
from tell.verbs.add_rows import _next, plan_addition

LABELS = ("positive", "negative", "mixed")


def write_rows(path: Path, names, label=lambda i: LABELS[i % 3]) -> Path:
    path.write_text("".join(json.dumps({"text": f"review {i}", "label": label(i)}) + "\n" for i in names))
    return path


@pytest.fixture(scope="module")
def grown(tiny_model, tmp_path_factory):
    """(old run, file of new rows, new run)."""
    root = tmp_path_factory.mktemp("add")
    shutil.copy(EXAMPLES / "reviews" / "train.jsonl", root / "data.jsonl")
    with (root / "data.jsonl").open("a") as out:
        out.write((EXAMPLES / "reviews" / "test.jsonl").read_text())
    task = {"data": str(root / "data.jsonl"), "test": None, "rows": None, "test_rows": 8}
    config = config_of(tiny_model("qwen3"), root / "run-1", example="reviews", task=task)
    old = tell.tune(config)
    more = write_rows(root / "more.jsonl", range(24))
    with more.open("a") as out:  # four rows that the run has
        out.writelines((root / "data.jsonl").read_text().splitlines(keepends=True)[:4])
    before = snapshot(old.root)
    new = tell.add(old.root, more)
    assert snapshot(old.root) == before  # nothing is written into the old run
    return old, more, new


def snapshot(root: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(root.rglob("*")) if path.name != ".lock"}


def test_old_rows_stay_in_their_parts(grown):
    old, _, new = grown
    before, after = read(old.split), read(new.split)
    assert new.root == old.root.with_name("run-2") and new.read_status()["state"] == "done"
    facts = read(new.added)
    assert sum(facts["new"].values()) + facts["repeated"] == 28 and facts["repeated"] >= 3
    for part in ("train", "validation", "test"):
        assert after[part][: len(before[part])] == before[part]
        assert len(after[part]) == facts["old"][part] + facts["new"][part] and facts["old"][part] == len(before[part])
    assert facts["new"]["test"] >= 6 and facts["new"]["validation"]
    hashes = [key for part in ("train", "validation", "test") for key in after[part]]
    assert len(hashes) == len(set(hashes))
    config = read_run_config(new)
    assert config.task.rows is config.task.test_rows is config.task.columns is None and config.task.kind == "label"
    assert Path(config.task.data) == (new.rows / "train.jsonl").resolve()
    assert {row["hash"] for row in read_jsonl(new.prediction("tell"))} == set(after["test"])


def test_both_runs_are_compared_on_old_and_on_new_test_rows(grown):
    old, _, new = grown
    facts, before = read(new.added), set(read(old.split)["test"])
    ours = keyed(read_jsonl(new.prediction("tell")))
    theirs = keyed([*read_jsonl(old.prediction("tell")), *read_jsonl(new.before("tell"))])
    assert ours.keys() == theirs.keys() and facts["arm"] == "tell" and facts["primary"] == "accuracy"
    for side, inside in (("old_test", True), ("new_test", False)):
        keys = [key for key in ours if (key[0] in before) is inside]
        a, b = ([rows[key]["answer"] == rows[key]["reference"] for key in keys] for rows in (ours, theirs))
        gap = difference(mean_metric([*map(float, a)], binary=True), mean_metric([*map(float, b)], binary=True), seed=0)
        found = facts[side]["accuracy"]
        assert found["difference"] == gap and len(keys) >= 6
        assert found["new"]["value"] == pytest.approx(sum(a) / len(a), abs=1e-6)
        assert found["old"]["value"] == pytest.approx(sum(b) / len(b), abs=1e-6)


def test_the_old_adapter_answers_new_rows_as_tell_eval_would(grown, tmp_path):
    old, _, new = grown
    copy = shutil.copytree(old.root, tmp_path / "copy")
    asked = tmp_path / "asked.jsonl"
    rows = read_jsonl(new.before("tell"))
    asked.write_text("".join(json.dumps({"text": r["prompt"], "label": r["reference"]}) + "\n" for r in rows))
    tell.evaluate(copy, arms=["tell"], test=str(asked))
    again = read_jsonl(RunFolder(copy).evaluated("tell"))
    assert [row["answer"] for row in again] == [row["answer"] for row in rows]


def test_a_grown_run_grows_again_and_can_be_evaluated(grown, tmp_path):
    _, _, new = grown
    plan = plan_addition(new.root, write_rows(tmp_path / "third.jsonl", range(20, 40)))
    before, added = read(new.split), plan["added"]
    assert added["repeated"] == 4 and added["old"] == {part: len(rows) for part, rows in before.items()}
    assert plan["task"]["test_rows"] == len(before["test"]) + added["new"]["test"]
    assert tell.evaluate(new.root, arms=["tell"])["arms"]["tell"]["accuracy"]["n"] == len(before["test"])


def test_the_command_plans_adds_and_shows_both_sides(grown, tmp_path, capsys):
    old, more, _ = grown
    assert tell_command(["add", str(old.root), str(more), "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["added"]["run"] == str(old.root.resolve())
    out = tmp_path / "out"
    assert tell_command(["add", str(old.root), str(more), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "old test rows" in printed.out and "new test rows" in printed.out
    assert "rows are left out: the run has them already" in printed.err
    assert tell_command(["report", str(old.root), str(out)]) == 0
    assert "shared test rows" in capsys.readouterr().err


@pytest.mark.parametrize("title", ["train tell", "answer"])
def test_an_interrupted_addition_is_resumed(grown, tmp_path, title, capsys):
    old, more, new = grown
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        tell.add(old.root, more, out=out, display=Killer(title))
    assert tell_command(["add", str(old.root), str(more), "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    tell.add(old.root, more, out=out, start="resume")
    ours, theirs = read(RunFolder(out).added), read(new.added)
    assert ours["old_test"] == theirs["old_test"] and ours["new_test"] == theirs["new_test"]


def test_an_addition_is_resumed_with_its_own_run_alone(grown, tmp_path):
    old, more, new = grown
    copy = shutil.copytree(old.root, tmp_path / "copy")
    with pytest.raises(TellError, match=r"was made from .*run-1"):
        tell.add(copy, more, out=new.root, start="resume")
    with pytest.raises(TellError, match="needs the folder"):
        tell.add(copy, more, start="resume")
    with pytest.raises(TellError, match="has no rows"):
        tell.add(copy, more, out=copy, start="resume")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "already in"),
        ("", "no rows|empty"),
        ('{"text": "x"}\n', "column|layout|answer"),
        ('{"text": "x", "label": ""}\n', "no answer"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_left(grown, tmp_path, content, message):
    old, _, _ = grown
    path = tmp_path / "more.jsonl"
    path.write_text((old.root.parent / "data.jsonl").read_text() if content is None else content)
    out = tmp_path / "out"
    if content is None:  # the run scored 8 of its test rows: the others are new to it
        known = {key for rows in read(old.split).values() for key in rows}
        lines = path.read_text().splitlines(keepends=True)
        hashes = [example.hash for example in load(str(path)).examples]
        path.write_text("".join(line for line, key in zip(lines, hashes, strict=True) if key in known))
    with pytest.raises(TellError, match=message):
        tell.add(old.root, path, out=out)
    assert not out.exists()


def test_what_tune_refuses_leaves_nothing(grown, tmp_path):
    old, more, _ = grown
    copy = shutil.copytree(old.root, tmp_path / "copy")
    config = (copy / "run.yaml").read_text()
    (copy / "run.yaml").write_text(
        config.replace(f"data: {old.root.parent}/data.jsonl", f"data: {tmp_path}/gone.jsonl")
    )
    with pytest.raises(TellError, match="no such file"):
        tell.add(copy, more, out=tmp_path / "out")
    (copy / "run.yaml").write_text(config.replace("  order: spread", "  order: sprad"))
    with pytest.raises(TellError, match="sprad"):
        tell.add(copy, more, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(TellError, match="contains other files"):
        tell.add(old.root, more, out=tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


@pytest.fixture(scope="module")
def much_validation(tiny_model, tmp_path_factory):
    """(folder, configuration) of an interrupted run with more validation rows than are measured."""
    root = tmp_path_factory.mktemp("validation")
    data = write_rows(root / "data.jsonl", range(200))
    task = {"data": str(data), "test": None, "rows": None, "test_rows": None}
    task |= {"test_fraction": 0.05, "validation_fraction": 0.5}
    eval_ = {"arms": ["base"], "bootstrap": 100, "forgetting_rows": 0, "forgetting_answers": 0}
    general = {"source": "none"}
    config = config_of(tiny_model("llama"), root / "run", example="reviews", task=task, general=general, eval=eval_)
    with pytest.raises(Interrupted):
        tell.tune(config, display=Killer("answer"))
    return RunFolder(root / "run"), config


def test_all_validation_rows_stay_in_their_part(much_validation, tmp_path):
    folder, config = much_validation
    split = read(folder.split)
    counts = {part: len(hashes) for part, hashes in split.items()}
    assert sum(counts.values()) == 200 and counts["validation"] == 95
    assert read(folder.plan)["split"].items() >= counts.items()
    assert read(folder.plan)["task"]["validation_rows"] == 95
    assert "validation losses are of the first 64 of 95 validation rows" in read(folder.plan)["notices"]
    seen = tell.look(config)
    assert seen["split"].items() >= counts.items()
    assert sum(value["validation"] for value in seen["fields"][0]["values"]) == 95
    copy = RunFolder(shutil.copytree(folder.root, tmp_path / "copy"))
    tell.tune(config.model_copy(update={"out": str(copy.root)}), resume=True)
    added = plan_addition(copy.root, write_rows(tmp_path / "export.jsonl", range(204)))["added"]
    assert sum(added["new"].values()) == 4 and added["repeated"] == 200 and added["old"] == counts


@pytest.mark.parametrize(("first", "accepted"), [(0, True), (1, False)])
def test_an_older_run_that_lists_the_measured_validation_rows_is_resumed(much_validation, tmp_path, first, accepted):
    folder, config = much_validation
    copy = RunFolder(shutil.copytree(folder.root, tmp_path / "copy"))
    split = read(folder.split)
    copy.split.write_text(json.dumps(split | {"validation": split["validation"][first : first + 64]}))
    config = config.model_copy(update={"out": str(copy.root)})
    if accepted:
        tell.tune(config, resume=True)
        assert read(copy.split) == split and copy.read_status()["state"] == "done"
    else:
        with pytest.raises(TellError, match="the data has changed"):
            tell.tune(config, resume=True)


@pytest.mark.parametrize("place", [".", "../copy", "rows", "../link/new"])
def test_the_old_run_is_not_overwritten_by_the_new_one(grown, tmp_path, place):
    old, more, _ = grown
    copy = shutil.copytree(old.root, tmp_path / "copy")
    (tmp_path / "link").symlink_to(copy)
    before = snapshot(copy)
    with pytest.raises(TellError, match=r"is the run to which rows are added|is in the run .*copy"):
        tell.add(copy, more, out=copy / place, start="overwrite")
    assert snapshot(copy) == before


@pytest.mark.parametrize(
    ("name", "taken", "expected"),
    [("run-1", [], "run-2"), ("run", [], "run-2"), ("run-1", ["run-2"], "run-3"), ("a-b", [], "a-b-2")],
)
def test_the_next_folder_is_free(tmp_path, name, taken, expected):
    for each in (name, *taken):
        (tmp_path / each).mkdir()
    assert _next(tmp_path / name) == tmp_path / expected
