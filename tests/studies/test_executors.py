"""Executors are found by name; forgotten and duplicate ones are errors."""

from __future__ import annotations

import pytest

import tell
from tell.errors import TellError
from tell.studies.executors import execution as registry
from tell.studies.executors.execution import Execution, executor, executors
from tell.studies.executors.local import LocalExecutor
from tell.studies.recipe import Resources


def test_every_module_registers_one():
    assert list(executors()) == ["local", "ray"]
    assert isinstance(Execution().start(Resources()), LocalExecutor)


def test_a_name_that_is_taken_and_one_that_is_unknown():
    with pytest.raises(ValueError, match="two executors are named local"):
        executor("local")(lambda execution, resources: LocalExecutor())
    with pytest.raises(TellError, match=r"--executor: no executor 'slurm'.*Use local or ray"):
        Execution("slurm").start(Resources())


def test_options_of_another_executor_are_refused():
    with pytest.raises(TellError, match="--workers with --executor ray"):
        Execution("ray", workers=2).start(Resources())
    for options in ({"cpus": 2}, {"gpus": 0}):
        with pytest.raises(TellError, match=r"--cpus, --gpus.*--executor ray"):
            Execution(**options).start(Resources())


def test_a_module_that_registers_none_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "forgotten.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(registry.tell.studies.executors, "__path__", [str(tmp_path)])
    with pytest.raises(ValueError, match="forgotten registers no executor"):
        executors.__wrapped__()


def test_an_object_may_be_given(recipe, tmp_path):
    class Idle:
        def run(self, queue):
            self.waiting = len(queue.waiting)

    idle = Idle()
    folder = tell.run_study(recipe(), root=tmp_path / "studies", execution=Execution(idle))
    assert idle.waiting == 4 and {cell["state"] for cell in folder.read()["cells"].values()} == {"waiting"}
