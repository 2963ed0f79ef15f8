"""The cells of a study as they are handed out, locked, noted and told of; ``study.json`` after every change."""

from __future__ import annotations

import platform
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from filelock import FileLock, Timeout

from tell.files import write_json
from tell.folder import reading
from tell.names import metric
from tell.names import show as number
from tell.progress import Advance, Display
from tell.run.stop import Stop
from tell.studies.cells import Cell, Row, changed_inputs, contents
from tell.studies.executors.run_cell import InnerDisplay, Outcome, prune
from tell.studies.labels import metric_term, value_name
from tell.studies.study_folder import Root, StudyFolder
from tell.studies.study_plan import evaluation_key

BESIDE = 10.0  # seconds that a cell takes besides what is predicted, about: without them short cells mislead
LOOK_AGAIN = 1.0  # seconds between looks at cells that another process runs
PUBLIC = ("state", "error", "seconds", "attempts", "host")  # of a cell's record, what study.json tells
NOTHING = {"state": "waiting", "error": None, "seconds": None, "attempts": 0, "host": None}


class Queue:
    """Hands out the cells that are not finished, each under its lock.

    Args:
        head: what ``study.json`` says besides rows and cells.
        stop: asked before each cell.
        retry_failed: run failed cells again, rather than leave them failed.
        keep_adapters: of finished cells.
    """

    def __init__(
        self,
        folder: StudyFolder,
        root: Root,
        head: Mapping[str, Any],
        rows: Sequence[Row],
        cells: Sequence[Cell],
        *,
        display: Display,
        stop: Stop,
        retry_failed: bool = False,
        keep_adapters: bool = False,
    ) -> None:
        self.folder, self.root, self.head, self.rows = folder, root, head, rows
        self.display, self.stop, self.keep_adapters = display, stop, keep_adapters
        self.cells = {cell.name: cell for cell in cells}
        self.contents = {cell.name: contents(cell.config) for cell in cells}
        self.points = shared_points(rows)
        self.states: dict[str, dict[str, Any]] = {}
        self.held: dict[str, FileLock] = {}
        self.retried: dict[str, int] = {}  # failed cells to be run again, and how often they were tried when we looked
        self.predicted: Mapping[str, float] = {}
        self.advance: Advance = lambda amount=1, info="", left=None: None
        for name in self.cells:
            self._look(name, retry_failed)
        # What has twice not come to its end may have killed its process: the others go first.
        self.waiting = sorted(
            (cell for cell in cells if self.states[cell.name]["state"] == "waiting"),
            key=lambda cell: max(1, self.states[cell.name]["attempts"]),
        )
        self.start()

    def start(self) -> None:
        """Count cells and time from here on."""
        self.first, self.begin = len(self.waiting), time.monotonic()

    def _look(self, name: str, retry_failed: bool = False) -> str:
        """The state of a cell as its folder and record tell it; a killed one is waiting."""
        record = self.root.record(name)
        if self.root.finished(name):
            state = "done"
        elif record.get("state") == "failed" and not retry_failed:
            state = "failed"
        else:
            state = "waiting"
            if record.get("state") == "failed":
                self.retried[name] = record.get("attempts", 0)
        known = {key: record[key] for key in PUBLIC if key in record}
        error = record.get("error") if state == "failed" else None
        self.states[name] = {**NOTHING, **known, "state": state, "error": error}
        if state == "done" and self.states[name]["seconds"] is None:
            self.states[name]["seconds"] = self.root.cell(name).read_status().get("seconds")
        return state

    def _over(self, name: str, record: Mapping[str, Any]) -> bool:
        """Whether a cell that was not done has been ended by another process since we looked."""
        failed = record.get("state") == "failed" and record.get("attempts", 0) != self.retried.get(name)
        return self.root.finished(name) or failed

    def _hear(self) -> None:
        """Take over what other processes have ended meanwhile."""
        for name in self.states.keys() - self.held.keys():
            if self.states[name]["state"] != "done" and self._over(name, self.root.record(name)):
                self._look(name)

    def counts(self) -> Counter[str]:
        """How many cells are in each state."""
        self._hear()
        return Counter(state["state"] for state in self.states.values())

    def write(self) -> None:
        """``study.json`` as things stand."""
        self._hear()
        rows = [row.to_dict() for row in self.rows]
        write_json(self.folder.state, {**self.head, "rows": rows, "cells": self.states})

    def take(self, *, wait: bool = True) -> Cell | None:
        """The next cell, its lock held by this process until `finish` or `give_back`.

        Args:
            wait: for cells that other processes run, in case they die; False returns None instead.

        Raises:
            Interrupted: a signal has come.
        """
        while self.waiting:
            for cell in list(self.waiting):
                self.stop.check()
                lock = self.root.lock(cell.name)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    self._elsewhere(cell.name)
                    continue
                self.waiting.remove(cell)
                record = self.root.record(cell.name)
                if self._over(cell.name, record):
                    self._settle(cell, lock)
                    continue
                if changed := changed_inputs(cell.config, self.contents[cell.name]):
                    self._spoil(cell, changed)
                    lock.release()
                    continue
                self.held[cell.name] = lock
                facts = {"state": "running", "error": None, "host": platform.node()}
                self._note(cell.name, **facts, attempts=record.get("attempts", 0) + 1)
                return cell
            if not wait:
                return None
            if self.waiting:
                time.sleep(LOOK_AGAIN)
        return None

    def finish(self, cell: Cell, outcome: Outcome) -> None:
        """Note how a cell ended, tell of it, and give its lock back.

        Numbers of files that changed meanwhile are thrown away: the cell's name says that they are of other ones.
        """
        changed = changed_inputs(cell.config, self.contents[cell.name]) if outcome.error is None else []
        if changed:
            shutil.rmtree(self.root.cell(cell.name).root, ignore_errors=True)
            self._spoil(cell, changed)
            self.held.pop(cell.name).release()
            return
        if outcome.error is None:
            facts: dict[str, Any] = {"state": "done", "error": None, **timing(self.root, cell)}
        else:
            facts = {"state": "failed", "error": outcome.error, "trace": outcome.trace}
        self._note(cell.name, **facts, host=outcome.host)
        lock = self.held.pop(cell.name)
        self._tell(cell)
        lock.release()

    def give_back(self) -> None:
        """Release every cell that is held; what is done of it stays for the next time."""
        for name, lock in list(self.held.items()):
            self._note(name, state="waiting")
            lock.release()
            del self.held[name]

    def display_for(self, cell: Cell) -> InnerDisplay:
        """Shows a running cell within the study's bar."""
        return InnerDisplay(self.advance, self.label(cell))

    def label(self, cell: Cell) -> str:
        """``tell, task.rows 15, seed 42``."""
        point = [f"{key} {value_name(value, key)}" for key, value in self.points[cell.name].items()]
        return ", ".join([cell.arm, *point, f"seed {cell.config.seed}"])

    def _note(self, name: str, **facts: Any) -> None:
        record = self.root.note(name, **facts)
        self.states[name] = {**NOTHING, **{key: record[key] for key in PUBLIC if key in record}}
        self.write()

    def _elsewhere(self, name: str) -> None:
        if self.states[name]["state"] != "running":
            record = self.root.record(name)
            self.states[name] |= {"state": "running", "host": record.get("host")}
            self.write()

    def _spoil(self, cell: Cell, changed: Sequence[str]) -> None:
        """Leave a cell waiting for the next time, and say why."""
        self.root.note(cell.name, state="waiting")
        text = f"{' and '.join(changed)} changed while the study ran: start it again, cells are named by what they read"
        self.states[cell.name] |= {"state": "failed", "error": text}
        self.write()
        self._tell(cell)

    def _settle(self, cell: Cell, lock: FileLock) -> None:
        self._look(cell.name)
        self.write()
        lock.release()
        self._tell(cell)

    def adopt(self) -> None:
        """Note cells whose process was killed between their last number and their record."""
        for name, cell in self.cells.items():
            if self.states[name]["state"] == "done" and self.root.record(name).get("state") != "done":
                with self.root.lock(name):
                    if self.root.record(name).get("state") != "done":
                        if not self.keep_adapters:
                            prune(self.root.cell(name))
                        self._note(name, state="done", error=None, **timing(self.root, cell))

    def _tell(self, cell: Cell) -> None:
        """One line for a cell that has ended."""
        state = self.states[cell.name]
        ended = self.first - len(self.waiting) - len(self.held)
        mark = "✓" if state["state"] == "done" else "✗"
        text = f"{mark} {ended}/{self.first} {self.label(cell)}: "
        if state["state"] == "done":
            text += f"{main_score(self.root, cell)}, {span(state['seconds'] or 0)}"
        else:
            text += f"failed: {state['error']}"
        if (left := self._left()) is not None:
            text += f"; about {span(left)} left"
        self.display.note(text)
        self.advance(1, left=left)

    def _left(self) -> float | None:
        """Seconds until all is done: what is predicted of the rest, at the pace so far."""
        rest = [*(cell.name for cell in self.waiting), *self.held]
        ended = [name for name in self.predicted if name not in rest]
        before = sum(self.predicted[name] + BESIDE for name in ended)
        after = sum(self.predicted.get(name, 0.0) + BESIDE for name in rest)
        return (time.monotonic() - self.begin) * after / before if before and after else None


def shared_points(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """What all rows of a cell have in common, by cell."""
    shared: dict[str, dict[str, Any]] = {}
    for row in rows:
        old = shared.setdefault(row.cell, row.point)
        shared[row.cell] = {key: value for key, value in old.items() if row.point.get(key, row) == value}
    return shared


def timing(root: Root, cell: Cell) -> dict[str, Any]:
    """Seconds of a finished cell, and of its training loop; and what its evaluation may be compared with."""
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
    name = metric(primary).phrase
    return f"no {name}" if value is None else f"{name} {number(value, metric_term(primary).unit)}"


def span(seconds: float) -> str:
    """``42 s``, ``12 min``, ``3.5 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
