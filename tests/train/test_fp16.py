"""fp16: the loss is scaled, a step whose gradients overflow is skipped, said and counted."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from tell.errors import Diverged, Interrupted
from tell.train import trainer as trainers
from tell.train import update as updates
from tell.train.lora import add_lora
from tell.train.plain import PlainBody, plain_step_loss
from tell.train.step import Body, StepRules, step_loss
from tell.train.update import Update
from train.packed import assert_close, gradients, load, make_rows, wake
from train.test_trainer import CONFIG, adapter, equal, log, mixture_of, trainer

HALF = CONFIG.model_copy(update={"lora_dropout": 0.0, "micro_tokens": 1000})


@pytest.fixture(params=["single", "flat"])
def form(request, monkeypatch):
    monkeypatch.setattr(trainers, "FLAT_DEVICES", ("cpu",) if request.param == "flat" else ())
    return request.param


@pytest.fixture
def scales(monkeypatch):
    """The scale of the loss at each step, the first one chosen by the test."""

    class Seen(list):
        def begin(self, scale: float) -> None:
            monkeypatch.setattr(updates, "FIRST_SCALE", scale)

    seen = Seen()
    clip = Update.clip

    def watch(self):
        if self.scale is not None:  # in fp16
            seen.append(float(self.scale))
        return clip(self)

    monkeypatch.setattr(Update, "clip", watch)
    return seen


@pytest.mark.parametrize("path", ["fast", "plain"])
@pytest.mark.parametrize("divisor", [1.0, 1e4])
def test_scaled_gradients_are_those_of_fp32(path, divisor, tiny_model):
    """Even where the loss's slopes, of a row among very many, would be rounded to zero in fp16."""
    rows, found = make_rows((40, 30, 20)), {}
    for dtype, scale in ((torch.float32, None), (torch.float16, torch.tensor(2.0**12)), (torch.float16, None)):
        model = add_lora(load(tiny_model("llama"), dtype=dtype), HALF, seed=1, fused=path == "fast")
        wake(model)
        total = 3 * divisor
        if path == "fast":
            out = step_loss(Body(model), rows, StepRules(scale=scale), total=total)
        else:
            out = plain_step_loss(PlainBody(model), rows, StepRules(scale=scale), total=total)
        factor = 1.0 if scale is None else float(scale)
        found[dtype, scale is None] = out.loss, {name: g / factor for name, g in gradients(model).items()}
    exact, scaled, bare = found[torch.float32, True], found[torch.float16, False], found[torch.float16, True]
    assert scaled[0] == pytest.approx(exact[0], rel=1e-2)
    assert_close(scaled[1], exact[1], 0.02)
    if divisor > 1:
        lost = [name for name, g in bare[1].items() if (g - exact[1][name]).norm() > 0.1 * exact[1][name].norm()]
        assert lost


def test_training_in_fp16_is_that_in_fp32(form, scales, tiny_model, tmp_path):
    losses = {}
    for dtype in (torch.float32, torch.float16):
        notes, folder = [], tmp_path / str(dtype)
        trainer(load(tiny_model("llama"), dtype=dtype), folder, HALF, note=notes.append).run()
        losses[dtype] = [row["loss"] for row in log(folder)]
        assert not any("skipped" in note for note in notes)
        assert all(value.dtype == torch.float32 for value in adapter(folder).values())
    assert scales == [updates.FIRST_SCALE] * 5
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=1e-2)


def test_a_step_that_overflows_is_skipped_and_said(form, scales, tiny_model, tmp_path, monkeypatch):
    scales.begin(2.0**24)
    notes, weights, apply = [], [], Update.apply

    def watch(self, rate, bad=None):
        before = [t.detach().clone() for t in self.tensors]
        apply(self, rate, bad)
        weights.append(all(torch.equal(a, b) for a, b in zip(before, self.tensors, strict=True)))

    monkeypatch.setattr(Update, "apply", watch)
    config = HALF.model_copy(update={"batch_size": 1})
    trainer(load(tiny_model("llama"), dtype=torch.float16), tmp_path, config, note=notes.append).run()
    rows = log(tmp_path)
    skipped = [row["grad_norm"] is None for row in rows]
    count = sum(skipped)
    assert 0 < count < len(rows) == 17 and skipped == weights
    assert skipped[0] and not skipped[-1]
    for (now, after), lost in zip(pairwise(scales), skipped, strict=False):
        assert after == (now / 2 if lost else now)
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert [note for note in notes if f"{count} of 17 steps were skipped" in note]
    assert "NaN" not in (tmp_path / "logs" / "tell.jsonl").read_text()
    assert all(torch.isfinite(value).all() for value in adapter(tmp_path).values())


def test_gradients_that_overflow_at_any_scale_end_the_run(form, scales, tiny_model, tmp_path):
    scales.begin(2.0**80)
    with pytest.raises(Diverged, match=r"diverged at step 5 of 5.*model\.dtype=fp32"):  # none of its steps counts
        trainer(load(tiny_model("llama"), dtype=torch.float16), tmp_path, HALF).run()
    config = HALF.model_copy(update={"batch_size": 1, "task_weight": 1.0})
    with pytest.raises(Diverged, match="diverged at step 20 of 30"):
        mix = mixture_of(5, 20)
        trainer(load(tiny_model("llama"), dtype=torch.float16), tmp_path / "b", config, mix=mix).run()
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_scale_and_the_count_survive_a_resume(form, scales, tiny_model, tmp_path):
    scales.begin(2.0**20)
    config, model = HALF.model_copy(update={"batch_size": 1}), load(tiny_model("llama"), dtype=torch.float16)
    told: dict[str, list[str]] = {"whole": [], "cut": []}
    trainer(model, tmp_path / "whole", config, note=told["whole"].append).run()
    expected = list(scales)
    scales.clear()
    asked = iter([False, False, False, True])
    with pytest.raises(Interrupted):
        trainer(model, tmp_path / "cut", config, stopped=lambda: next(asked)).run()
    facts = json.loads((tmp_path / "cut" / "adapter" / "checkpoint" / "facts.json").read_text())
    assert facts["scaler"]["scale"] == expected[4] and facts["skipped"] > 0
    trainer(model, tmp_path / "cut", config, note=told["cut"].append).run(resume=True)
    assert scales == expected and told["cut"] == told["whole"] != []
    assert equal(adapter(tmp_path / "cut"), adapter(tmp_path / "whole"))


def test_a_checkpoint_from_before_counts_are_kept_resumes(form, tiny_model, tmp_path):
    model = load(tiny_model("llama"))
    with pytest.raises(Interrupted):
        trainer(model, tmp_path, HALF, stopped=lambda: True).run()
    path = tmp_path / "adapter" / "checkpoint" / "facts.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({k: facts[k] for k in ("digest", "step", "tokens", "trained_tokens", "seconds")}))
    trainer(model, tmp_path, HALF).run(resume=True)
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4, 5]
