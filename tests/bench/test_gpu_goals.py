"""What a run on a GPU is judged by, and how its trainings are counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.gpu import checks, goals, runners, training
from bench.gpu.goals import BIG, SMALL, Goal
from bench.gpu.run import SIZES, Run, equal_rows, make_model, quantised, rows_for, train_rows


def test_verdicts():
    speed, memory = Goal("speed", ("a",), 10, 20), Goal("memory", ("a",), 10, None, at_most=True)
    assert [speed.verdict(x) for x in (None, 9, 10, 20)] == ["not measured", "MISSED", "accepted", "aim reached"]
    assert [memory.verdict(x) for x in (10, 11)] == ["accepted", "MISSED"]
    assert [Goal("aim", ("a",), None, 20).verdict(x) for x in (19, 20)] == ["aim not reached", "aim reached"]


def test_every_figure_has_its_place():
    stages = {"train": {f"{SMALL}: tell": {"tokens_s": 90_000}}, "resume": {"float32": {"equal": True}}}
    stages |= {"peers": {f"{SMALL}: peft": {"tokens_s": 10_000}, f"{SMALL}: other": {"error": "out of memory"}}}
    stages |= {"liger": {f"{SMALL}: liger": {"tokens_s": 30_000}, f"{BIG}: liger": {"tokens_s": 1}}}
    found = {row["name"]: (row["value"], row["verdict"]) for row in goals.judged(stages)}
    assert goals.ratios(stages) == {SMALL: 3.0}
    assert found["135M LoRA bf16"] == (90_000, "aim not reached")
    assert found["135M against the best peer of this run"] == (3.0, "accepted")
    assert found["resumed adapter, fp32"] == (1.0, "accepted")
    assert found["8B LoRA bf16, rows of 150 tokens"] == (None, "not measured")
    assert "8B against the best peer of this run" not in found
    assert "| 135M LoRA bf16 | 90,000 tokens/s |  | ≥ 100,000 | aim not reached |" in goals.table(stages, "a card")


def test_goals_name_trainings_that_exist():
    names = {goal.path[1] for goal in goals.GOALS if goal.path[0] == "train"}
    measured = {f"{size}: {name}" for name, variant in training.JUDGED.items() for size in variant.sizes}
    assert names <= measured and {size.split(":")[0] for size in measured} <= set(SIZES)


def test_speed_is_of_the_steps_after_the_warm_up():
    rows = equal_rows("tiny", 8, 10)
    timed = runners.Timed(0.0, ends=[9.0, 10.0, 11.0, 13.0], losses=[1.0] * 4)
    facts = timed.facts(rows, runners.Plan(2, 2, 2))
    assert facts["tokens_s"] == round(40 / 3) and facts["first_step_s"] == 9.0 and facts["tokens_step"] == 20
    assert facts["ms_step"] == 1500.0 and facts["steps"] == "2 after 2"


def test_a_training_that_was_stopped_is_told_by_its_last_steps():
    rows, plan = equal_rows("tiny", 200, 10), runners.Plan(2, 16, 32)
    timed = runners.Timed(0.0, ends=[9.0, 10.0, 11.0, 12.0, 14.0], losses=[1.0] * 5, whole=False)
    assert timed.facts(rows, plan)["steps"] == "3 after 2" and timed.facts(rows, plan)["tokens_s"] == 15
    timed.even = True
    assert timed.facts(rows, plan)["tokens_s"] == 15  # not the tokens of all 100 steps
    with pytest.raises(ValueError, match="no time left after 3 steps"):
        runners.Timed(0.0, ends=[9.0, 10.0, 11.0]).facts(rows, plan)


def test_a_figure_that_is_no_number_is_missed_and_is_strict_json(tmp_path):
    run = Run(tmp_path, "cpu", True, ["tiny"], 8, 512, 60)
    run.stages = {"equal": {"float32": {"loss_gap": float("nan")}, "bfloat16": {"loss_gap": np.float32(0.5)}}}
    run.find("gap", (np.float64("inf"), np.bool_(True)))
    run.save()

    def refuse(text):
        raise AssertionError(text)

    text = (tmp_path / "result.json").read_text()
    known = json.loads(text, parse_constant=refuse)
    assert known["stages"]["equal"] == {"float32": {"loss_gap": "nan"}, "bfloat16": {"loss_gap": 0.5}}
    assert known["findings"] == [["gap", ["inf", True], True]]
    for stages in (run.stages, known["stages"]):
        verdicts = {goal["name"]: goal["verdict"] for goal in goals.judged(stages)}
        assert verdicts["8 steps, fp32 against CPU fp32"] == "MISSED"
    assert np.isnan(checks._gap([(1.0, 1.0), (float("nan"), 1.0), (1.0, 1.0)]))


def test_a_part_is_turned_off_and_on_again():
    own = training.flops_a_token
    with runners.without("bench.gpu.training", "flops_a_token"):
        assert training.flops_a_token(1, 2) is None
    assert training.flops_a_token is own
    with pytest.raises(AttributeError), runners.without("bench.gpu.training", "no_such_part"):
        pass


def test_rows_of_one_length():
    rows = equal_rows("tiny", 3, 7)
    assert rows.lengths.tolist() == [7, 7, 7] and rows.trained.tolist() == [4, 4, 4] and rows.ids.max() < 512


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantised_model_trains(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, run = make_model("tiny", "cpu", torch.bfloat16), Run(tmp_path, "cpu", True, ["tiny"], 8, 512, 60)
    rows = rows_for("tiny", 8, 0.2)
    flops = training.flops_a_token(model, train_rows(rows))
    plain = model.model.layers[0].mlp.up_proj.weight.clone()
    layer = quantised(model, base).model.layers[0].mlp.up_proj
    assert layer.weight.dtype in (torch.uint8, torch.int8)
    assert float((layer.dense(torch.float32) - plain.float()).norm() / plain.float().norm()) < 0.2
    assert training.flops_a_token(model, train_rows(rows)) == flops  # though the weights are packed
    losses = runners.tell(run, model, rows, runners.Plan(4, 0, 2), {}).losses
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_nothing_is_held_back_on_a_cpu():
    run = Run(Path("nowhere"), "cpu", True, ["tiny"], 8, 512, 60)
    with training.held_back(run, 12) as taken:
        assert taken == 0
