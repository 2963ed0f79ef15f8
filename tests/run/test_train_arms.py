"""What stays in the folder of an arm after its training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tell.errors import Diverged
from tell.folder import RunFolder
from tell.progress import Silent
from tell.run import train_arms as trainings
from tell.run.task import Notices
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
