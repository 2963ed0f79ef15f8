"""Settings searched on folds of the task rows: what is held out, what is chosen, and that nothing else changes."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tell
from run.runs import Killer, comparable, config_of, read
from tell.anchor.anchor import NO_ANCHOR
from tell.cli.main import run as command
from tell.config import Config
from tell.data.example import Example
from tell.errors import Interrupted, TellError
from tell.files import read_jsonl, write_json
from tell.folder import RunFolder
from tell.nested import merge
from tell.run.arms import arm_config
from tell.run.folds import folds_of, parts_of, pooled
from tell.run.general_rows import read_general
from tell.run.prepare import prepare
from tell.run.search_record import chosen_settings
from tell.run.task import load_task
from tell.run.time_budget import Extent
from tell.score.scored import Metric
from tell.verbs.evaluate import evaluate

SEARCH = {
    "task": {"rows": 6, "test_rows": 3},
    "mix": {"repeat": None},
    "general": {"rows": None, "tokens": None},
    "train": {"learning_rate": None, "batch_size": 16},
    "search": {"minutes": 60, "folds": 3},
    "eval": {"arms": ["sft-tuned", "tell"], "forgetting_rows": 4, "forgetting_answers": 0},
    "generate": {"max_new_tokens": 12, "greedy": True, "closed": "fused"},
}


def searching(model: Path, out: Path | None = None, example: str = "support", **sections) -> Config:
    return config_of(model, out, example=example, **merge(SEARCH, sections))


@pytest.fixture(scope="module")
def found(tiny_model, tmp_path_factory) -> tuple[RunFolder, Config]:
    config = searching(tiny_model("llama"), tmp_path_factory.mktemp("searched") / "run")
    return tell.tune(config), config


def prepared_of(config: Config):
    return prepare(load_task(config), NO_ANCHOR, read_general(load_task(config)))


def test_each_row_is_held_out_once_and_no_test_row_is_used(tiny_model):
    run = prepared_of(searching(tiny_model("llama")))
    folds = folds_of(run, 3)
    held = [row.hash for fold in folds for row in fold.run.task.test]
    assert sorted(held) == sorted(row.hash for row in run.task.train)
    for fold in folds:
        train, test = ({row.hash for row in rows} for rows in (fold.run.task.train, fold.run.task.test))
        assert not train & test and len(train | test) == 6
        assert set(fold.run.table.hashes) == train
        assert not (train | test) & {row.hash for row in run.task.test}
        assert len(fold.run.draw) == round(len(run.draw) * 4 / 6)
        assert (fold.run.draw.indices == run.draw.indices[: len(fold.run.draw)]).all()


def test_rows_of_one_label_are_spread_and_a_lone_label_is_not_held_out(tiny_model):
    task = load_task(searching(tiny_model("llama"), example="reviews"))
    names = ["a"] * 3 + ["b"] * 3 + ["c"]
    rows = [Example.pair(row.question, name) for row, name in zip(task.train, names, strict=False)]
    run = prepared_of(searching(tiny_model("llama"), example="reviews"))
    run = replace(run, task=replace(run.task, train=rows, kind=replace(run.task.kind, labels=("a", "b", "c"))))
    folds = folds_of(run, 3)
    assert [sorted(row.answer for row in fold.run.task.test) for fold in folds] == [["a", "b"]] * 3


def test_rows_with_one_prompt_are_in_one_part(tiny_model):
    task = load_task(searching(tiny_model("llama")))
    twice = [replace(row, origin=f"again:{i}") for i, row in enumerate(task.train[:4])]
    task = replace(task, train=[*task.train[:6], *twice])
    for part in parts_of(task, 3):
        held, others = ({task.train[i].question for i in rows} for rows in (part, np.setdiff1d(range(10), part)))
        assert held and not held & others


def test_fewer_rows_than_folds_are_refused(tiny_model):
    task = load_task(searching(tiny_model("llama")))
    with pytest.raises(TellError, match=r"search\.folds.*2 task rows with different prompts.*3 folds") as refused:
        parts_of(replace(task, train=task.train[:2]), 3)
    assert "search.folds to 2" in str(refused.value)


def test_metrics_of_folds_are_pooled_by_their_sums():
    def f1(sums: np.ndarray) -> np.ndarray:
        return 2 * sums[..., 0] / (sums[..., 1] + sums[..., 2])

    a, b = np.array([[1.0, 2, 3], [0, 1, 1]]), np.array([[4.0, 4, 5]])
    both = pooled([Metric(a, f1, f1(a)), Metric(b, f1, f1(b))])
    assert both.value == pytest.approx(2 * 5 / (7 + 9)) and len(both.per_row) == 3


def test_the_choice_is_recorded_and_trained(found):
    folder, _ = found
    record = read(folder.search)["arms"]
    assert list(record) == ["tell", "sft-tuned"]
    for arm, one in record.items():
        rungs = [entry for entry in one["tried"] if entry["folds"] == [0] and "mix.repeat" in entry]
        assert len({entry["train.learning_rate"] for entry in rungs}) == 3  # the usual, twice and half of it
        assert len({entry["mix.repeat"] for entry in rungs}) == 3  # halving ends at one and a half times the usual
        assert {entry["general"] for entry in rungs} == ({1.0, 1 / 3} if arm == "tell" else {1.0})
        counts = [sum(e["mix.repeat"] == n for e in rungs) for n in sorted({e["mix.repeat"] for e in rungs})]
        assert counts == ([4, 2, 1] if arm == "tell" else [3, 2, 1])
        assert one["why"] in " ".join(read(folder.findings)["notices"])
        assert one["metric"] == "field_accuracy" and one["seconds"] > 0
    assert not folder.searching.exists()
    results = read(folder.metrics)["train"]["arms"]
    for arm, keys in chosen_settings(folder).items():
        usual = 2e-3 if arm == "tell" else 1e-3  # among general rows, and alone
        assert results[arm]["learning_rate"] == keys.get("train.learning_rate", usual)
    repeat = chosen_settings(folder)["tell"].get("mix.repeat", 24)
    assert read(folder.plan)["task"]["repeat"] == repeat


def test_a_choice_decides_what_is_trained(tiny_model, tmp_path):
    """The record of an earlier session is taken as it is: two arms, each with settings of its own."""
    out = RunFolder(tmp_path / "run")
    config = searching(tiny_model("llama"), out.root)
    keys = {
        "tell": {"train.learning_rate": 2e-3, "mix.repeat": 5, "general.rows": 3},
        "sft-tuned": {"train.learning_rate": 5e-4, "mix.repeat": 2, "generate.closed": "off"},
    }
    with pytest.raises(Interrupted):
        tell.tune(config, display=Killer("search tell: rung", 1, signal.SIGTERM))
    one = {"metric": "field_accuracy", "tried": [], "why": "as told", "seconds": 1.0}
    write_json(out.search, {"arms": {arm: {**one, "chosen": chosen} for arm, chosen in keys.items()}})
    tell.tune(config, resume=True)
    arms = read(out.metrics)["train"]["arms"]
    assert (arms["tell"]["learning_rate"], arms["sft-tuned"]["learning_rate"]) == (2e-3, 5e-4)
    assert read(out.metrics)["mixture"]["rows"] == {"task": 6 * 5, "general": 3}
    assert arms["sft-tuned"]["steps"] == -(-6 * 2 // 16)
    evaluate(out.root)
    for arm in keys:
        before, now = read_jsonl(out.prediction(arm)), read_jsonl(out.evaluated(arm))
        assert [row["answer"] for row in before] == [row["answer"] for row in now]
    evaluate(out.root, overrides=["generate.closed=likelihood"])
    answers = [row["answer"] for row in read_jsonl(out.evaluated("sft-tuned"))]
    assert answers != [row["answer"] for row in read_jsonl(out.prediction("sft-tuned"))]  # what is typed wins
    assert all(answer.startswith('{"category":') for answer in answers)
    assert arm_config(config, "tell-anchor", keys).mix.repeat == 5  # by the adapter, not by the arm
    assert arm_config(config, "icl-readout", keys) is config


@pytest.mark.parametrize("moment", ["search tell: rung", "search sft-tuned: run"])
def test_resumed_equals_uninterrupted(found, tiny_model, tmp_path, moment):
    folder, config = found
    other = RunFolder(tmp_path / "run")
    config = config.model_copy(update={"out": str(other.root)})
    with pytest.raises(Interrupted):
        tell.tune(config, display=Killer(moment, 1, signal.SIGTERM))
    tell.tune(config, resume=True)
    ours, theirs = read(folder.search)["arms"], read(other.search)["arms"]
    assert {arm: one["chosen"] for arm, one in ours.items()} == {arm: one["chosen"] for arm, one in theirs.items()}
    assert comparable(read(folder.metrics)) == comparable(read(other.metrics))
    weights = [f.adapter_of("sft-tuned").weights.read_bytes() for f in (folder, other)]
    assert weights[0] == weights[1]


def test_a_choice_of_decoding_alone_leaves_the_training_as_it_is(tiny_model):
    run = prepared_of(searching(tiny_model("llama"), eval={"arms": ["sft-tuned", "tell-averaged", "tell"]}))
    chosen = replace(run, chosen={"sft-tuned": {"generate.closed": "off"}, "tell": {"generate.closed": "readout"}})
    for arm in ("sft-tuned", "tell", "tell-averaged"):
        assert len(chosen.mixtures[arm][1]) == len(run.mixtures[arm][1])


def test_a_variant_of_tell_differs_by_its_ingredient_alone(tiny_model):
    run = prepared_of(searching(tiny_model("llama"), eval={"arms": ["sft-averaged", "tell-averaged", "tell"]}))
    run = replace(run, chosen={"tell": {"mix.repeat": 3, "train.learning_rate": 4e-3}})
    one, other, control = (run.task_of(arm).config for arm in ("tell", "tell-averaged", "sft-averaged"))
    assert (other.mix.repeat, other.train.learning_rate, other.train.average) == (3, 4e-3, 0.25)
    other.train.average = one.train.average
    assert one == other and control.train.learning_rate is None


def test_a_time_limit_shrinks_what_was_chosen_for_each_arm_alike(tiny_model):
    run = prepared_of(searching(tiny_model("llama"), eval={"arms": ["sft-tuned", "tell"]}))
    usual = Extent.of(run)
    run = replace(run, chosen={"tell": {"mix.repeat": 36}, "sft-tuned": {"mix.repeat": 12}})
    assert Extent.of(run) == usual and usual.repeat == 24
    assert Extent.of(run).apply(run).chosen == run.chosen
    half = replace(usual, repeat=12).apply(run).chosen
    assert half == {"tell": {"mix.repeat": 18}, "sft-tuned": {"mix.repeat": 6}}


@pytest.mark.parametrize(
    "settings",
    [{"average": 0.5, "adapter_scale": 0.5}, {"schedule": "constant"}, {"general_target": "untuned"}],
    ids=lambda settings: "-".join(settings),
)
def test_a_fold_is_trained_as_the_run_is(tiny_model, tmp_path, settings):
    """With settings that change the saved weights, the rate's decay or the targets."""
    given = {"train": settings, "mix": {"repeat": 2}, "general": {"rows": 5}, "eval": {"arms": ["tell"]}}
    folder = tell.tune(searching(tiny_model("llama"), tmp_path / "run", **given))
    one = read(folder.search)["arms"]["tell"]
    assert {tuple(entry["folds"]) for entry in one["tried"] if "mix.repeat" in entry} == {(0,), (1,), (2,)}
    assert read(folder.metrics)["train"]["arms"]["tell"]["steps"] == 2


def test_a_search_that_leaves_no_time_to_train_is_refused_at_once(tiny_model, tmp_path):
    config = searching(tiny_model("llama"), tmp_path / "run", max_minutes=20.0, search={"minutes": 10})
    with pytest.raises(TellError, match=r"10 minutes for each of sft-tuned, tell leaves no time to train"):
        tell.tune(config)
    few = searching(tiny_model("llama"), tmp_path / "run", task={"rows": 2})
    with pytest.raises(TellError, match=r"2 task rows with different prompts cannot be divided into 3 folds"):
        tell.tune(few)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("chosen", [{"generate.closed": "nonsense"}, {"out": "/elsewhere"}, {"mix.repeat": -1}])
def test_a_foreign_record_is_damage_not_a_setting(found, tmp_path, chosen):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(found[0].root, folder.root)
    one = read(folder.search)
    one["arms"]["tell"]["chosen"] = chosen
    write_json(folder.search, one)
    with pytest.raises(TellError, match=r"search\.json: is damaged"):
        evaluate(folder.root)


def test_without_a_search_the_searched_control_is_the_matched_one(tiny_model, tmp_path):
    arms = {"arms": ["sft-matched", "sft-tuned", "tell"]}
    folder = tell.tune(searching(tiny_model("llama"), tmp_path / "run", search={"minutes": None}, eval=arms))
    assert read(folder.metrics)["same"] == {"sft-tuned": "sft-matched"}
    assert not folder.search.exists()


def test_too_little_time_changes_nothing_and_says_so(tiny_model, tmp_path):
    arms = {"arms": ["tell"]}
    folder = tell.tune(searching(tiny_model("llama"), tmp_path / "run", search={"minutes": 1e-4}, eval=arms))
    one = read(folder.search)["arms"]["tell"]
    assert one["chosen"] == {} and "too short to compare two candidates" in one["why"]


def test_what_the_user_set_is_not_searched(tiny_model, tmp_path):
    given = {"train": {"learning_rate": 3e-3}, "mix": {"repeat": 2}, "general": {"rows": 5}, "eval": {"arms": ["tell"]}}
    folder = tell.tune(searching(tiny_model("llama"), tmp_path / "run", **given))
    tried = [entry for entry in read(folder.search)["arms"]["tell"]["tried"] if "mix.repeat" in entry]
    kept = {(e["train.learning_rate"], e["mix.repeat"], e["general"]) for e in tried}
    assert kept == {(3e-3, 2, 1.0)}


def test_the_flag_and_bad_values(tiny_model, tmp_path, capsys):
    data = str(Path(__file__).parents[2] / "examples/support/train.jsonl")
    common = ["plan", data, "--model", str(tiny_model("llama")), "--general", "none", "--json"]
    assert command([*common, "--search", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted"]["searching_seconds"] == 300  # tell alone is searched
    for typed in (["--search", "0"], ["--search", "soon"], ["--set", "search.folds=1"]):
        assert command([*common, *typed]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
