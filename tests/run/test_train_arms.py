"""What stays in the folder of an arm after its training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tell.errors import Diverged
from tell.folder import RunFolder
from tell.progress import Silent
from tell.run import train_arms as trainings
from tell.run.task import Notices
from tell.train.step_log import StepReport
from tell.train.training_job import TrainResult


@pytest.mark.parametrize("diverges", [False, True])
def test_no_checkpoint_stays_nor_one_that_a_killed_session_set_aside(diverges, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    adapter = folder.adapter_of("sft")
    for name in ("checkpoint", ".checkpoint.old"):
        (adapter.root / name).mkdir(parents=True)

    def train(*_):
        if diverges:
            raise Diverged("training diverged")
        return TrainResult(3, 60, 30, 0.1, 1e-3)

    monkeypatch.setattr(trainings, "_train", train)
    monkeypatch.setattr(trainings, "write_adapter_notes", lambda *_: None)
    prepared = SimpleNamespace(lead="tell", task=SimpleNamespace(notices=Notices(Silent())))
    journal = SimpleNamespace(folder=folder, at=lambda stage: None)
    trained = trainings.train_arms(prepared, ["sft"], SimpleNamespace(), journal)
    assert list(trained.failed) == (["sft"] if diverges else [])
    assert [path.name for path in adapter.root.iterdir()] == ["failed.json" if diverges else "result.json"]


def test_a_resumed_run_knows_how_its_arms_were_computed(tmp_path, monkeypatch):
    folder, session = RunFolder(tmp_path), SimpleNamespace()
    journal = SimpleNamespace(folder=folder, at=lambda stage: None)
    folder.adapter_of("sft").root.mkdir(parents=True)

    def train(prepared, arm, *_):
        prepared.task.notices.hear(arm, "CUDA graphs: 3 captured")
        return TrainResult(3, 60, 30, 0.1, 1e-3)

    monkeypatch.setattr(trainings, "_train", train)
    monkeypatch.setattr(trainings, "write_adapter_notes", lambda *_: None)
    found = []
    for _ in range(2):
        prepared = SimpleNamespace(lead="tell", task=SimpleNamespace(notices=Notices(Silent())))
        results = trainings.train_arms(prepared, ["sft"], session, journal).results
        found.append((results, prepared.task.notices.computed, prepared.task.notices.display.notes))
    assert found[0] == found[1] and found[0][1] == {"CUDA graphs": "3 captured"}
    folder.adapter_of("sft").result.write_text('{"steps": 3, "computed": 5}')
    assert trainings.train_arms(prepared, ["sft"], session, journal).results == {"sft": {"steps": 3}}


def test_the_bar_never_goes_back_for_numbers_that_come_late():
    """A GPU's step is reported while the next is computed, whose tokens are counted already; the end is exact."""
    steps = []
    counter = trainings._Counter(lambda amount, info="", left=None: steps.append(amount))

    def report(step, total):
        return StepReport(step, 3, 1.0, {"task": 1.0}, 10, total, 1.0)

    counter.moved(10)
    counter.moved(10)  # of step 2
    counter.step(report(1, 10))
    counter.moved(15)  # of step 3, whose first pass ran twice: it had no memory
    counter.step(report(2, 20))
    counter.step(report(3, 30))
    assert steps == [10, 10, 0, 15, 0, -5] and sum(steps) == 30
    resumed = trainings._Counter(lambda amount, info="", left=None: steps.append(amount))
    steps.clear()
    resumed.moved(10)
    resumed.step(report(2, 20))  # 10 of an earlier session
    assert sum(steps) == 20
