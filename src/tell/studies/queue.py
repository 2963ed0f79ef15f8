"""The queue of a study's cells: hands them out under their locks, records how they end, reports progress.

``study.json`` is written after every change.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from tell.files import write_json
from tell.folder import reading
from tell.metric_names import metric
from tell.number_text import show
from tell.progress import Advance, Display
from tell.run.stop import Stop
from tell.studies.cells import Cell, Row, changed_inputs, contents
from tell.studies.labels import value_name
from tell.studies.run_cell import InnerDisplay, Outcome, prune
from tell.studies.study_folder import Root
from tell.studies.study_plan import evaluation_key

if TYPE_CHECKING:
    from tell.studies.open_study import Study

OVERHEAD = 10.0  # rough overhead of a cell in seconds; without it short cells distort the estimate
LOOK_AGAIN = 1.0  # seconds between checks of cells that another process runs
NOTHING = {"state": "waiting", "error": None, "seconds": None, "attempts": 0, "host": None}  # a record in study.json


class CellQueue:
    """Hands out the cells that are not finished, each under its lock.

    Args:
        stop: checked before each cell.
        retry_failed: hand out failed cells again.
        keep_adapters: of finished cells.
    """

    def __init__(
        self, study: Study, *, display: Display, stop: Stop, retry_failed: bool = False, keep_adapters: bool = False
    ) -> None:
        self.folder, self.root, self.head, self.rows = study.folder, study.root, study.head(), study.rows
        self.display, self.stop, self.keep_adapters = display, stop, keep_adapters
        self.cells = {cell.name: cell for cell in study.cells}
        self.contents = {cell.name: contents(cell.config) for cell in study.cells}
        self.points = shared_points(study.rows)
        self.states: dict[str, dict[str, Any]] = {}
        self.deaths: dict[str, int] = {}  # attempts that were not given back, at the start
        self.held: dict[str, FileLock] = {}
        self.retried: dict[str, int] = {}  # failed cells to run again, with their number of attempts at the start
        self.predicted: dict[str, float] = {}
        self.predict: Callable[[Cell], float] | None = None  # for cells that are not in `predicted` yet
        self.elsewhere = False  # whether the last `take` met cells that another process runs
        self.deadline: float | None = None  # on the clock of `time.monotonic`
        self.advance: Advance = lambda amount=1, info="", left=None: None
        for name in self.cells:
            self._look(name, retry_failed)
        # A cell that was started twice and never ended may have killed its process: run the others first.
        self.waiting = sorted(
            (cell for cell in study.cells if self.states[cell.name]["state"] == "waiting"),
            key=lambda cell: max(1, self.deaths[cell.name]),
        )
        self.start()

    def start(self) -> None:
        """Count cells and time from here on."""
        self.first, self.begin = len(self.waiting), time.monotonic()
        self.paces = (0.0, 0.0)  # of cells that ended since: seconds predicted, seconds taken

    def _look(self, name: str, retry_failed: bool = False) -> None:
        """Set the state of a cell from its folder and record; a killed one is waiting."""
        record = self.root.record(name)
        self.deaths[name] = record.get("attempts", 0) - record.get("stopped", 0)
        failed = record.get("state") == "failed"
        state = "done" if self.root.finished(name) else "failed" if failed and not retry_failed else "waiting"
        if state == "waiting" and failed:
            self.retried[name] = record.get("attempts", 0)
        self._set(name, record, state=state, error=record.get("error") if state == "failed" else None)
        if state == "done" and self.states[name]["seconds"] is None:
            self.states[name]["seconds"] = self.root.cell(name).read_status().get("seconds")

    def _set(self, name: str, record: Mapping[str, Any], **facts: object) -> None:
        self.states[name] = {**NOTHING, **{key: record[key] for key in NOTHING if key in record}, **facts}

    def _over(self, name: str, record: Mapping[str, Any]) -> bool:
        """Whether another process has ended a cell since the last check."""
        failed = record.get("state") == "failed" and record.get("attempts", 0) != self.retried.get(name)
        return self.root.finished(name) or failed

    def _refresh(self) -> None:
        """Record cells that other processes have ended meanwhile."""
        for name in self.states.keys() - self.held.keys():
            if self.states[name]["state"] != "done" and self._over(name, self.root.record(name)):
                self._look(name)

    def counts(self) -> Counter[str]:
        """Number of cells in each state."""
        self._refresh()
        return Counter(state["state"] for state in self.states.values())

    def write(self) -> None:
        """Write ``study.json``."""
        self._refresh()
        rows = [row.to_dict() for row in self.rows]
        write_json(self.folder.state, {**self.head, "rows": rows, "cells": self.states})

    def take(self, *, wait: bool = True) -> Cell | None:
        """The next cell; this process holds its lock until `finish` or `give_back`. None when none is left.

        With a deadline, cells that are predicted to end after it stay waiting.

        Args:
            wait: for cells that other processes run, in case they die; False returns None instead.

        Raises:
            Interrupted: a signal was received.
        """
        while self.waiting:
            self.elsewhere = False
            for cell in list(self.waiting):
                self.stop.check()
                if not self._fits(cell):
                    continue
                if self._claim(cell):
                    return cell
                self.elsewhere |= cell in self.waiting
            if not (wait and self.elsewhere):
                return None
            time.sleep(LOOK_AGAIN)
        return None

    def _fits(self, cell: Cell) -> bool:
        """Whether a cell is predicted to end before the deadline, at the pace of those that have ended."""
        if self.deadline is None:
            return True
        left = self.deadline - time.monotonic()
        if cell.name not in self.predicted and self.predict is not None and left > 0:
            self.predicted[cell.name] = self.predict(cell)
        before, pace = self.paces
        expected = (self.predicted.get(cell.name, 0.0) + OVERHEAD) * (pace / before if before else 1.0)
        return expected <= left

    def _claim(self, cell: Cell) -> bool:
        """Lock a waiting cell and record that it runs; False if it runs elsewhere, has ended, or its inputs changed."""
        name, lock = cell.name, self.root.lock(cell.name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if self.states[name]["state"] != "running":
                self.states[name] |= {"state": "running", "host": self.root.record(name).get("host")}
                self.write()
            return False
        self.waiting.remove(cell)
        record = self.root.record(name)
        if self._over(name, record):
            self._look(name)
            self.write()
            lock.release()
            self._report(cell)
            return False
        if changed := changed_inputs(cell.config, self.contents[name]):
            self._discard(cell, changed)
            lock.release()
            return False
        self.held[name] = lock
        self._note(name, state="running", error=None, host=platform.node(), attempts=record.get("attempts", 0) + 1)
        return True

    def finish(self, cell: Cell, outcome: Outcome) -> None:
        """Record how a cell ended, report it, and release its lock.

        If its input files changed meanwhile, its numbers are deleted: its name is the hash of the old ones.
        """
        changed = changed_inputs(cell.config, self.contents[cell.name]) if outcome.error is None else []
        if changed:
            shutil.rmtree(self.root.cell(cell.name).root, ignore_errors=True)
            self._discard(cell, changed)
            self.held.pop(cell.name).release()
            return
        if outcome.error is None:
            facts: dict[str, Any] = {"state": "done", "error": None, **timing(self.root, cell)}
            predicted, taken = self.paces
            self.paces = predicted + self.predicted.get(cell.name, 0.0) + OVERHEAD, taken + facts["seconds"]
        else:
            facts = {"state": "failed", "error": outcome.error, "trace": outcome.trace}
        self._note(cell.name, **facts, host=outcome.host)
        lock = self.held.pop(cell.name)
        self._report(cell)
        lock.release()

    def give_back(self) -> None:
        """Release all held cells; the next study resumes them. One that has ended meanwhile counts as done."""
        for name in list(self.held):
            lock = self.held.pop(name)
            self._note(name, state="waiting", stopped=self.root.record(name).get("stopped", 0) + 1)
            lock.release()

    def adopt(self) -> None:
        """Record finished cells that were unpacked, or whose process was killed before it could."""
        for name, cell in self.cells.items():
            if self.states[name]["state"] == "done" and self.root.record(name).get("state") != "done":
                with self.root.lock(name):
                    if self.root.record(name).get("state") != "done":
                        if not self.keep_adapters:
                            prune(self.root.cell(name))
                        self._note(name, state="done", error=None, **timing(self.root, cell))

    def _note(self, name: str, **facts: object) -> None:
        self._set(name, self.root.note(name, **facts))
        self.write()

    def _discard(self, cell: Cell, changed: Sequence[str]) -> None:
        """Leave a cell waiting for the next study, and say why."""
        self.root.note(cell.name, state="waiting")
        text = f"{' and '.join(changed)} changed while the study ran: start it again, cells are named by their inputs"
        self.states[cell.name] |= {"state": "failed", "error": text}
        self.write()
        self._report(cell)

    def display_for(self, cell: Cell) -> InnerDisplay:
        """Shows a running cell within the study's bar."""
        return InnerDisplay(self.advance, self.label(cell))

    def label(self, cell: Cell) -> str:
        """``tell, task.rows 15, seed 42``."""
        point = [f"{key} {value_name(value, key)}" for key, value in self.points[cell.name].items()]
        return ", ".join([cell.arm, *point, f"seed {cell.config.seed}"])

    def _report(self, cell: Cell) -> None:
        """Show one line for a cell that has ended."""
        state = self.states[cell.name]
        done = state["state"] == "done"
        ended = self.first - len(self.waiting) - len(self.held)
        text = f"{'✓' if done else '✗'} {ended}/{self.first} {self.label(cell)}: "
        text += f"{main_score(self.root, cell)}, {span(state['seconds'] or 0)}" if done else f"failed: {state['error']}"
        if (left := self._left()) is not None:
            text += f"; about {span(left)} left"
        self.display.note(text)
        self.advance(1, left=left)

    def _left(self) -> float | None:
        """Seconds until all cells are done or the time is up: the prediction for the rest at the pace so far."""
        if self.deadline is not None:
            return max(0.0, self.deadline - time.monotonic())
        rest = [*(cell.name for cell in self.waiting), *self.held]
        before = sum(seconds + OVERHEAD for name, seconds in self.predicted.items() if name not in rest)
        after = sum(self.predicted.get(name, 0.0) + OVERHEAD for name in rest)
        return (time.monotonic() - self.begin) * after / before if before and after else None


def shared_points(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The values that all rows of a cell have in common, by cell."""
    shared: dict[str, dict[str, Any]] = {}
    for row in rows:
        old = shared.setdefault(row.cell, row.point)
        shared[row.cell] = {key: value for key, value in old.items() if row.point.get(key, row) == value}
    return shared


def timing(root: Root, cell: Cell) -> dict[str, Any]:
    """Seconds of a finished cell and of its training loop, and the key of its evaluation."""
    folder = root.cell(cell.name)
    with reading(folder.root):
        trained = sum(arm["seconds"] for arm in folder.read(folder.metrics)["train"]["arms"].values())
    seconds = float(folder.read_status().get("seconds", 0))
    return {"seconds": seconds, "training_seconds": round(trained, 3), "evaluation": evaluation_key(cell)}


def main_score(root: Root, cell: Cell) -> str:
    """``schema adherence 84.5 %`` of a finished cell."""
    folder = root.cell(cell.name)
    metrics = folder.read(folder.metrics)
    primary = metrics["task"]["primary"]
    value = (metrics["arms"].get(metrics["task"].get("lead", cell.arm), {}).get(primary) or {}).get("value")
    spec = metric(primary)
    return f"no {spec.phrase}" if value is None else f"{spec.phrase} {show(value, spec.unit)}"


def span(seconds: float) -> str:
    """``42 s``, ``12 min``, ``3.5 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
