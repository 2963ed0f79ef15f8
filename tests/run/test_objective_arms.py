"""Arms with an objective of their own: trained by their own settings, on the run's rows, and compared."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tell
from run.runs import Killer, comparable, config_of, read
from tell.data.general import general_target
from tell.errors import Interrupted
from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.parts import PARTS
from tell.run.general_rows import read_general, trained_on
from tell.run.prepare import Prepared, prepare
from tell.run.task import anchor_of, load_task
from tell.train.trainer import DISTILLED

OBJECTIVES = ["tell-distilled", "tell-averaged", "sft-averaged", "tell-prompts", "sft-prompts"]
ARMS = ["base", "sft-matched", "sft-readout", "tell", *OBJECTIVES]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> tuple[RunFolder, tell.Config]:
    config = config_of(tiny_model("llama"), tmp_path_factory.mktemp("objectives") / "run", eval={"arms": ARMS})
    return tell.tune(config), config


def weights(folder: RunFolder, arm: str) -> dict[str, torch.Tensor]:
    return load_file(folder.adapter_of(arm).weights)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def alone(config: tell.Config, out: Path, *arms: str, **sections) -> tell.Config:
    """The run with some arms only, by default `tell`, in another folder."""
    scored = config.eval.model_copy(update={"arms": arms or ("tell",)})
    return config.model_copy(update={"eval": scored, "out": str(out), **sections})


def ready(config: tell.Config) -> Prepared:
    task = load_task(config)
    return prepare(task, anchor_of(config), read_general(task))


def test_each_has_its_own_adapter_and_is_compared_with_its_control(run):
    folder, _ = run
    metrics = read(folder.metrics)
    assert set(metrics["arms"]) == set(ARMS) and not metrics["failed"]
    pairs = [pair for part in PARTS for pair in part.pairs if set(pair) & set(OBJECTIVES)]
    assert len(pairs) == 5 and all(f"{a} - {b}" in metrics["differences"] for a, b in pairs)
    trained = [arm for arm in ARMS if arm not in ("base", "sft-readout")]
    adapters = [weights(folder, arm) for arm in trained]
    assert not any(equal(a, b) for i, a in enumerate(adapters) for b in adapters[:i])
    steps = {arm: read(folder.adapter_of(arm).result)["steps"] for arm in trained}
    assert len(set(steps.values())) == 1, steps
    assert not list(folder.root.rglob("targets.safetensors")) and not list(folder.root.rglob("checkpoint"))


def test_the_log_of_the_distilled_arm_says_so(run):
    folder, _ = run
    assert {name for row in read_jsonl(folder.losses("tell-distilled")) for name in row["by_source"]} == {
        "task",
        DISTILLED,
    }
    assert {name for row in read_jsonl(folder.losses("tell")) for name in row["by_source"]} == {"task", "general"}


def test_an_arms_setting_is_the_runs_setting(run, tmp_path):
    """A run whose own `tell` has the setting leaves the very adapter of the arm."""
    folder, config = run
    for arm, key, value in (
        ("tell-distilled", "general_target", "untuned"),
        ("tell-averaged", "average", 0.25),
        ("tell-prompts", "loss_on", "all"),
    ):
        train = config.train.model_copy(update={key: value})
        other = alone(config, tmp_path / arm, train=train)
        assert equal(weights(tell.tune(other), "tell"), weights(folder, arm)), arm


def test_the_scale_reaches_every_program_that_loads_the_adapter(run, tmp_path):
    folder, config = run
    train = config.train.model_copy(update={"adapter_scale": 0.5})
    other = alone(config, tmp_path / "half", train=train)
    half, whole = weights(tell.tune(other), "tell"), weights(folder, "tell")
    assert all(torch.equal(half[name], (0.5 if "lora_B" in name else 1) * value) for name, value in whole.items())


def test_prompts_are_trained_in_the_runs_own_rows(run):
    """Every token but the first, of task and general rows; the run's own tables stay, which losses are measured on."""
    _, config = run
    prepared = ready(config)
    for arm, sources in (("tell-prompts", {"task", "general"}), ("sft-prompts", {"task"})):
        _, mixture = prepared.mixtures[arm]
        _, other = prepared.mixtures["tell" if arm == "tell-prompts" else "sft-matched"]
        assert set(mixture.sources) == sources and mixture.digest() == other.digest()
        for name in sources:
            for i in range(len(mixture.tables[name])):
                (ids, mask), (same, answer) = (made.tables[name].row(i) for made in (mixture, other))
                assert np.array_equal(ids, same) and mask.tolist() == [False, *[True] * (len(ids) - 1)]
                assert answer.sum() < mask.sum() == mixture.tables[name].trained[i]
    with pytest.raises(ValueError, match="answers alone"):
        trained_on(prepared.general.table, "answer")


def test_a_key_that_is_the_runs_anyway_or_has_no_effect_makes_no_second_run(tiny_model):
    def same(**sections) -> dict[str, str]:
        return ready(config_of(tiny_model("llama"), eval={"arms": ["tell", *OBJECTIVES]}, **sections)).same

    assert same() == {}
    assert same(train={"loss_on": "all"}) == {"tell-prompts": "tell"}
    assert same(train={"average": 0.25}) == {"tell-averaged": "tell"}
    assert same(train={"general_target": "untuned"}) == {"tell-distilled": "tell"}
    without = same(general={"source": "none"})
    assert without["tell-distilled"] == "tell" and len(without) == 3  # and each sft- arm is its tell- arm


def test_a_model_keeps_its_own_distributions_over_rows_that_another_wrote(tiny_model):
    def config(**sections):
        return config_of(tiny_model("llama"), eval={"arms": ["tell", "tell-distilled"]}, **sections)

    for source, target in (("auto", "untuned"), ("builtin", "untuned"), ("self", "text"), ("none", "text")):
        assert load_task(config(general={"source": source})).general_target == target, source
    assert load_task(config()).general_target == "text"  # a file of the user's
    assert load_task(config(preset="paper", general={"source": "builtin"})).general_target == "text"
    builtin = config(general={"source": "builtin", "rows": 10})
    assert general_target(builtin, wrote_builtin=True) == "text"
    prepared = ready(builtin)
    assert prepared.same == {"tell-distilled": "tell"}
    assert not any("SmolLM2" in text for text in prepared.task.notices.texts)
    text = ready(config(general={"source": "builtin", "rows": 10}, train={"general_target": "text"}))
    assert text.same == {} and any("SmolLM2-135M's answers" in notice for notice in text.task.notices.texts)


def test_the_plan_counts_what_distilling_costs(run):
    _, config = run
    planned = tell.plan(config)["arms"]
    assert 0 < planned["tell-distilled"]["target_seconds"] < planned["tell"]["seconds"]
    more = planned["tell-distilled"]["seconds"] - planned["tell-distilled"]["target_seconds"]
    assert more == pytest.approx(planned["tell"]["seconds"])
    assert planned["tell"]["flops"] < planned["tell-distilled"]["flops"] < 1.6 * planned["tell"]["flops"]
    assert "target_seconds" not in planned["tell"]
    json.dumps(planned)


@pytest.mark.parametrize(
    ("title", "after"),
    [("targets of the general rows", 1), ("train tell-distilled", 6), ("train tell-averaged", 12)],
)
def test_resumed_equals_uninterrupted(title, after, run, tmp_path):
    folder, config = run
    arms = ("tell", "tell-distilled", "tell-averaged")
    other = alone(config, tmp_path / "run", *arms)
    with pytest.raises(Interrupted):
        tell.tune(other, display=Killer(title, after, signal.SIGTERM))
    cut = RunFolder(tmp_path / "run")
    if title == "train tell-distilled":
        assert cut.adapter_of("tell-distilled").targets.exists()
    tell.tune(other, resume=True)
    for arm in arms:
        assert equal(weights(cut, arm), weights(folder, arm))
        assert cut.prediction(arm).read_bytes() == folder.prediction(arm).read_bytes()
    mine, whole = (comparable(read(place.metrics)) for place in (cut, folder))
    assert {arm: mine["arms"][arm] for arm in arms} == {arm: whole["arms"][arm] for arm in arms}
    assert not [path for path in Path(cut.root).rglob("targets.safetensors")]
