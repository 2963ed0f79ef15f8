"""Studies under a time limit and in several processes: what is begun, what is stopped, and that it goes on."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import yaml

import tell
from studies.studies import numbers
from tell.errors import Interrupted, TellError
from tell.run.stop import Stop
from tell.studies import queue as queues
from tell.studies import study as study_module
from tell.studies.cells import grid_of
from tell.studies.executors.execution import Execution
from tell.studies.open_study import open_study
from tell.studies.queue import CellQueue
from tell.studies.recipe import load_recipe
from tell.studies.run_cell import Outcome
from tell.studies.workers import Worker, Workers, _threads


def waiting_queue(recipe, root, **predicted):
    """The queue of a small study whose cells are predicted to take these seconds, by arm."""
    study = open_study(recipe(), root=root)
    queue = CellQueue(study, display=tell.progress.Silent(), stop=Stop(study.folder.root))
    queue.predict = lambda cell: predicted[cell.arm]
    return queue


def test_order_by_product(recipe):
    grid = [{"general.rows": [8], "arms": ["tell"]}, {"general.rows": [0], "arms": ["base", "sft"]}]
    path = recipe(grid=grid, seeds=[42, 43])
    by_seed, _ = grid_of(load_recipe(path), {})
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "order": "grid"}))
    rows, cells = grid_of(load_recipe(path), {})
    assert [(row.arm, row.seed) for row in rows] == [
        ("tell", 42), ("tell", 43), ("base", 42), ("sft", 42), ("base", 43), ("sft", 43)
    ]  # fmt: skip
    assert [row.seed for row in by_seed] == [42, 42, 42, 43, 43, 43]
    assert {row.cell for row in rows} == {row.cell for row in by_seed} == {cell.name for cell in cells}


def test_a_cell_that_would_not_end_in_time_is_not_begun(recipe, tmp_path):
    queue = waiting_queue(recipe, tmp_path / "studies", base=1, sft=200, tell=20)
    queue.deadline = time.monotonic() + 60
    names = [cell.arm for cell in iter(lambda: queue.take(wait=False), None)]
    assert "sft" not in names and set(names) == {"base", "tell"}
    assert [cell.arm for cell in queue.waiting] == ["sft"] and not queue.elsewhere
    queue.deadline = None
    assert queue.take(wait=False).arm == "sft"
    queue.give_back()


def test_the_pace_of_cells_that_ended_counts(recipe, tmp_path, monkeypatch):
    queue = waiting_queue(recipe, tmp_path / "studies", base=1, sft=10, tell=10)
    queue.deadline = time.monotonic() + 60
    monkeypatch.setattr(queues, "timing", lambda root, cell: {"seconds": 110.0})  # ten times what was predicted
    monkeypatch.setattr(queues, "main_score", lambda root, cell: "")
    first = queue.take()
    queue.finish(first, Outcome())
    assert queue.take(wait=False) is None and len(queue.waiting) == 3


def test_the_end_of_the_time_stops_as_a_signal_does(tmp_path):
    outer, inner = Stop(tmp_path), Stop(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with outer.listening(), outer.after(0.01), inner.listening():
        for _ in range(200):
            if inner.asked:
                break
            time.sleep(0.01)
        assert outer.asked and inner.asked
        with pytest.raises(Interrupted):
            inner.check()
    assert signal.getsignal(signal.SIGTERM) == before
    with outer.listening(), outer.after(None):
        assert threading.active_count() >= 1


def test_a_signal_at_the_end_of_the_time_meets_who_listens(tmp_path, monkeypatch):
    """The timer has looked for a listener when what it times ends: the listener stays until the signal was sent."""
    import tell.run.stop as stops

    caught, looked = [], threading.Event()

    def kill(pid, number):
        looked.set()
        time.sleep(0.1)
        caught.append(isinstance(signal.getsignal(number), stops._Caught))

    monkeypatch.setattr(stops.os, "kill", kill)
    stop = Stop(tmp_path)
    with stop.listening(), stop.after(0.0):
        assert looked.wait(5)
    assert caught == [True]


def test_the_time_counts_from_the_call(recipe, tmp_path, monkeypatch):
    """Opening a study with many cells takes long."""

    class Idle:
        def run(self, queue):
            self.left = queue.deadline - time.monotonic()

    opened, idle = study_module.open_study, Idle()
    monkeypatch.setattr(study_module, "open_study", lambda *a, **k: (time.sleep(0.3), opened(*a, **k))[1])
    tell.run_study(recipe(), root=tmp_path / "studies", execution=Execution(idle, minutes=1))
    assert 0 < idle.left < 59.7


def test_cells_that_were_stopped_keep_their_place(recipe, tmp_path):
    """Unlike those that were started as often and may have killed their process."""
    names = []
    for _ in range(3):
        queue = waiting_queue(recipe, tmp_path / "studies")
        names.append(queue.take().name)
        queue.give_back()
    assert len(set(names)) == 1 and queue.states[names[0]]["attempts"] == 3  # so it is no measurement of one session


def test_a_cell_that_ends_while_it_is_stopped_is_done(recipe, tmp_path, monkeypatch):
    queue = waiting_queue(recipe, tmp_path / "studies")
    cell = queue.take()
    monkeypatch.setattr(queue.root, "finished", lambda name: name == cell.name)
    queue.give_back()
    assert queue.counts() == {"done": 1, "waiting": 3}
    assert queue.folder.read()["cells"][cell.name]["state"] == "done"


def test_a_study_within_a_limit_goes_on_later(recipe, tmp_path):
    path, root, said = recipe(), tmp_path / "studies", []

    class Shown(tell.progress.Silent):
        def note(self, text):
            said.append(text)

    folder = tell.run_study(path, root=root, execution=Execution(minutes=0), display=Shown())
    assert {cell["state"] for cell in folder.read()["cells"].values()} == {"waiting"}
    assert any("would not end within the time limit" in text or "time limit stopped it" in text for text in said)
    folder = tell.run_study(path, root=root, execution=Execution(minutes=10))
    assert {cell["state"] for cell in folder.read()["cells"].values()} == {"done"}


def test_processes_give_what_one_process_gives(recipe, tmp_path):
    path = recipe(grid={"general.rows": [8]}, arms=["base", "tell"])
    one = tell.run_study(path, root=tmp_path / "one")
    two = tell.run_study(path, root=tmp_path / "two", execution=Execution(workers=2))
    assert numbers(one, tmp_path / "one") == numbers(two, tmp_path / "two")


def test_a_process_that_dies_is_an_error_of_its_cell(recipe, tmp_path, monkeypatch):
    queue = waiting_queue(recipe, tmp_path / "studies", base=1, sft=1, tell=1)
    first = queue.waiting[0].name
    monkeypatch.setattr(
        "tell.studies.workers.Worker.give",
        lambda self, cell, folder, keep_adapters: (setattr(self, "cell", cell), os.kill(self.process.pid, 9)),
    )
    Workers(1).run(queue)
    assert queue.states[first]["state"] == "failed" and "status -9" in queue.states[first]["error"]
    assert {state["state"] for state in queue.states.values()} == {"failed"}


def test_a_signal_to_all_processes_gives_their_cells_back(recipe, tmp_path, monkeypatch):
    """SIGTERM ends a process that is not in a cell at once; this one may learn of that before its own signal."""
    queue = waiting_queue(recipe, tmp_path / "studies", base=1, sft=1, tell=1)
    take = Worker.take

    def give(self, cell, folder, keep_adapters):
        self.cell = cell
        os.kill(self.process.pid, signal.SIGTERM)

    def look(self):
        threading.Timer(0.1, lambda: setattr(queue.stop, "asked", True)).start()
        return take(self)

    monkeypatch.setattr(Worker, "give", give)
    monkeypatch.setattr(Worker, "take", look)
    with pytest.raises(Interrupted):
        Workers(1).run(queue)
    queue.give_back()
    assert {state["state"] for state in queue.states.values()} == {"waiting"}


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr("tell.studies.workers.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with _threads(4):
        assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with _threads(4):
        assert os.environ["OMP_NUM_THREADS"] == "3"


def test_negative_minutes_are_refused_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(TellError, match="--minutes: -1 is negative"):
        tell.run_study(recipe(), root=tmp_path / "studies", execution=Execution(minutes=-1))
    assert not (tmp_path / "studies").exists()
