"""The pace for --max-minutes: on a GPU that of the training loop itself and of recorded decoding steps."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from run.runs import config_of, open_session
from tell.anchor.anchor import NO_ANCHOR
from tell.errors import Diverged
from tell.run import speed
from tell.run.costs import computed_by
from tell.run.task import load_task, task_table
from tell.train import trainer
from tell.train.step_log import StepReport


@pytest.fixture
def prepared(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    model = tiny_model("llama")
    config = config_of(model, tmp_path / "run", train={"checkpoint_every": 1, "report_to": ["tensorboard"]})
    task = load_task(config)
    return task, task_table(task, NO_ANCHOR), open_session(model, config)


class Clocked:
    """A trainer whose steps end at given seconds."""

    jobs: ClassVar[list] = []
    ends = (5.0, 9.0, 10.0, 11.0, 12.0, 14.0)
    diverges = False

    def __init__(self, model, job, *, device, hooks):
        self.job, self.hooks = job, hooks
        self.jobs.append(job)

    def run(self):
        for step, seconds in enumerate(self.ends, 1):
            self.hooks.progress(StepReport(step, 6, 1.0, {}, 1, step, seconds))
            if self.diverges:
                raise Diverged("at step 1")


def test_on_a_gpu_the_training_loop_is_timed(prepared, monkeypatch):
    """Without its warm-up, over the tokens that it computes; an adapter and a log that nobody keeps."""
    task, table, session = prepared
    kept = []
    monkeypatch.setattr(Clocked, "jobs", [])
    monkeypatch.setattr(trainer, "Trainer", Clocked)
    monkeypatch.setattr(speed, "keep_speed", lambda *given: kept.append(given[2:]))
    monkeypatch.setattr(speed, "_decoding_speed", lambda *_: 7.0)
    loaded = dataclasses.replace(session.loaded, device=torch.device("cuda"))
    session._held = loaded, session.engine
    speed.measure_pace(task, table, session)
    (job,) = Clocked.jobs
    size = task.config.train.batch_size
    assert job.mixture.steps(size) == speed.STEPS and len(job.mixture) == size * speed.STEPS
    assert (job.settings.checkpoint_every, job.settings.report_to, job.settings.general_target) == (0, (), "text")
    assert (job.mixture.row.reshape(speed.STEPS, size) == job.mixture.row[:size]).all()
    assert kept == [(pytest.approx(computed_by(task, job.mixture) / 2 / 4), 7.0)]
    assert not job.folder.parent.exists()
    monkeypatch.setattr(Clocked, "diverges", True)
    speed.measure_pace(task, table, session)
    assert len(kept) == 1


def test_the_loop_itself_gives_a_pace_and_the_model_back(prepared):
    task, table, session = prepared
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    assert speed._trainer_speed(task, table, session) > 0 and speed._step_speed(task, table, session) > 0
    after = session.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in session.model.parameters())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_recorded_steps_are_timed(device, prepared, monkeypatch):
    task, _, session = prepared
    engine, calls = session.engine, []
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *a, **k: calls.append((engine._fixed, *k)) or generate(*a, **k))
    monkeypatch.setattr(engine, "device", SimpleNamespace(type=device))
    monkeypatch.setattr("tell.decode.engine.free_bytes", lambda _: 1 << 30)
    monkeypatch.setattr(engine, "_token_bytes", 100)
    monkeypatch.setattr(engine, "fast", False)
    monkeypatch.setattr("tell.decode.engine.PlainBatch", plain_batch)
    assert speed._decoding_speed(task, engine)
    assert calls == ([(False, "progress")] if device == "cpu" else [(True,), (True, "progress")])
    assert not engine._fixed


def plain_batch(*given):
    from tell.decode.batch import PlainBatch

    return PlainBatch(*given[:-1], torch.device("cpu"))


def test_a_model_that_only_answers_is_not_trained(prepared, monkeypatch):
    task, table, session = prepared
    session.model.model.layers[1].mlp.up_proj.to("meta")
    monkeypatch.setattr(speed, "keep_speed", lambda *_: pytest.fail("kept"))
    speed.measure_pace(task, table, session)
