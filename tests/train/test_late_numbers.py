"""On a GPU nothing waits inside a step: its numbers come while the next is computed, and a bad step changes nothing."""

from __future__ import annotations

import pytest
import torch

from tell.errors import Diverged, Interrupted
from tell.train import step as steps
from tell.train import trainer as trainers
from tell.train.device import Fetch
from tell.train.step import Body, StepLoss, StepNumbers, StepRules, step_loss
from tell.train.trainer import Trainer
from tell.train.update import Update
from train.packed import load, make_rows
from train.test_trainer import CONFIG, adapter, equal, log, trainer


class Late(Fetch):
    """A fetch from a GPU: the numbers may be read once."""

    made: list[Late]

    def __init__(self, x):
        super().__init__(x)
        self.waits, self.host = True, self.host.clone()
        self.made.append(self)
        self.behind: int | None = None

    def array(self):
        assert self.behind is None, "read twice"
        self.behind = len(self.made) - 1 - self.made.index(self)
        return self.host.numpy()


@pytest.fixture(params=["single", "flat"])
def late(request, monkeypatch):
    """Every fetch, as on a GPU."""
    monkeypatch.setattr(Late, "made", [], raising=False)
    monkeypatch.setattr(steps, "Fetch", Late)
    monkeypatch.setattr(trainers, "FLAT_DEVICES", ("cpu",) if request.param == "flat" else ())
    return Late.made


def without_time(folder) -> list[dict]:
    return [{**row, "seconds": 0} for row in log(folder)]


def test_numbers_are_read_one_step_late_and_the_log_is_the_same(late, tiny_model, tmp_path, monkeypatch):
    model, reports, lines = load(tiny_model("llama")), [], []

    def seen(report):
        reports.append(report.step)
        lines.append(len(log(tmp_path / "late")))

    trainer(model, tmp_path / "late", progress=seen).run()
    assert [fetch.behind for fetch in late] == [1, 1, 1, 1, 0]
    assert reports == lines == [1, 2, 3, 4, 5]
    seconds = [row["seconds"] for row in log(tmp_path / "late")]
    assert seconds == sorted(seconds) and seconds[0] > 0
    monkeypatch.setattr(steps, "Fetch", Fetch)
    trainer(model, tmp_path / "now").run()
    assert without_time(tmp_path / "late") == without_time(tmp_path / "now")
    assert equal(adapter(tmp_path / "late"), adapter(tmp_path / "now"))


def test_checkpoints_marks_and_the_end_have_all_numbers(late, tiny_model, tmp_path):
    model, asked = load(tiny_model("llama")), iter([False, False, True])
    config = CONFIG.model_copy(update={"checkpoint_every": 2})
    trainer(model, tmp_path / "whole", config).run()
    late.clear()
    with pytest.raises(Interrupted, match="after step 3"):
        trainer(model, tmp_path / "cut", config, stopped=lambda: next(asked)).run()
    assert [fetch.behind for fetch in late] == [1, 0, 0]  # the second for the checkpoint, the third for the stop
    assert [row["step"] for row in log(tmp_path / "cut")] == [1, 2, 3]
    late.clear()
    trainer(model, tmp_path / "cut", marks={4: tmp_path / "mark"}).run(resume=True)
    assert [fetch.behind for fetch in late] == [0, 0]
    assert (tmp_path / "mark" / "adapter_model.safetensors").exists()
    assert without_time(tmp_path / "cut") == without_time(tmp_path / "whole")
    assert equal(adapter(tmp_path / "cut"), adapter(tmp_path / "whole"))


@pytest.mark.parametrize("divisor", [float("nan"), 0.0])
@pytest.mark.parametrize("bad", [2, 5])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(divisor, bad, late, tiny_model, tmp_path, monkeypatch):
    calls, weights, whole, total = [], [], Trainer._step, StepRules.total

    def step(self, run, number, rows, rate):
        calls.append(number)
        out = whole(self, run, number, rows, rate)
        weights.append([p.detach().clone() for p in run.parameters.values()])
        return out

    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setattr(StepRules, "total", lambda self, rows: divisor if len(calls) == bad else total(self, rows))
    config = CONFIG.model_copy(update={"micro_tokens": 1000})
    with pytest.raises(Diverged, match=rf"diverged at step {bad} of 5"):
        trainer(load(tiny_model("llama")), tmp_path, config, marks={bad: tmp_path / "mark"}).run()
    assert calls == list(range(bad))  # the mark wants to know before it is written
    assert all(torch.equal(a, b) for a, b in zip(weights[-1], weights[-2], strict=True))
    assert all(torch.isfinite(w).all() for w in weights[-1])
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists() and not (tmp_path / "mark").exists()
    assert [row["step"] for row in log(tmp_path)] == list(range(1, bad))


def test_one_more_step_may_be_launched_before_that_is_known(late, tiny_model, tmp_path, monkeypatch):
    applied, apply = [], Update.apply

    def watch(self, rate, bad=None):
        bad = torch.ones(()) if len(applied) == 1 else bad  # as if the second step's loss were not finite
        before = self.tensors[0].detach().clone()
        apply(self, rate, bad)
        applied.append(torch.equal(before, self.tensors[0]))

    class Wrong(Late):
        def array(self):
            return super().array() * (float("nan") if self.made.index(self) == 1 else 1)

    monkeypatch.setattr(Update, "apply", watch)
    monkeypatch.setattr(steps, "Fetch", Wrong)
    with pytest.raises(Diverged, match="diverged at step 2 of 5"):
        trainer(load(tiny_model("llama")), tmp_path).run()
    assert len(applied) == 3 and applied[1]
    assert [row["step"] for row in log(tmp_path)] == [1]


def test_a_step_that_has_not_arrived_can_be_sent_to_other_processes(late, tiny_model):
    import pickle

    out = step_loss(Body(load(tiny_model("llama"))), make_rows((9, 5)), StepRules(), backward=False)
    assert not out.arrived and float(out.bad) == 0 and late[0].behind is None
    again = pickle.loads(pickle.dumps(out))
    assert again.arrived and again.loss == out.loss > 0 and again.rows.tolist() == out.rows.tolist()
    assert StepLoss(StepNumbers(1.0, again.rows, 2.0), again.source, 14).norm == 2.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_copy_from_a_gpu_does_not_wait():
    x = torch.arange(1000.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        fetch = Fetch(x * 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fetch.waits and fetch.array().tolist() == [2.0 * i for i in range(1000)]
