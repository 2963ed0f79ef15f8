"""Runs and studies as the page shows them, read from their folders alone."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Set
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from tell.child_process import wait_ended
from tell.errors import TellError
from tell.files import first_rows, read_facts, stamp
from tell.folder import RunFolder
from tell.names import ARMS, arm_order
from tell.number_text import is_number
from tell.report.read_run import Run, get, mapping, rows_of
from tell.report.score_tables import leading_scores
from tell.report.sections import losses
from tell.run.claim import is_held
from tell.run.first_answers import arms_in, first_answers, label_of
from tell.shown import one_line
from tell.studies.study_folder import StudyFolder
from tell.ui.jobs import Job
from tell.ui.ui_root import UiRoot

ACTIVE, ENDED = ("starting", "running"), ("done", "interrupted", "failed")
MOST_ROWS = 100_000  # of a training log
MOST_CELLS = 200  # of a study that are listed
KEPT = "Stopped. Steps, arms and answers that were finished are kept; Resume goes on from there."


def tuning(root: UiRoot, name: str) -> Job:
    """The process of a run, where the page started it."""
    return Job(root, f"tune {name}")


def state_of(root: UiRoot, name: str) -> str:
    """``starting``, ``running``, ``done``, ``interrupted`` or ``failed``.

    A run that was killed left ``running`` behind, but no process holds its lock; one that ends says so before it has.
    """
    folder = _folder(root.path / name)
    state = read_facts(folder.status).get("state")
    if tuning(root, name).process() is not None:
        return "starting" if state != "running" and _begins(root, name) else "running"
    if state == "running":
        return "running" if is_held(folder) else "interrupted"
    return str(state) if state in ENDED else "failed"


def _begins(root: UiRoot, name: str) -> bool:
    """Whether the process of a run has yet to write its state: the one there is older."""
    return tuning(root, name).record().get("started", 0.0) > stamp(_folder(root.path / name).status)[0]


def resume(root: UiRoot, name: str) -> None:
    """Resume a run, once the process that was stopped has ended; a second click changes nothing."""
    with (job := tuning(root, name)).alone():
        if job.process() is not None and read_facts(_folder(root.path / name).status).get("state") in ENDED:
            if _begins(root, name):
                return
            if not wait_ended(job.record(), kill=False):
                raise TellError("has not ended yet", where=name, remedy="Resume it in a minute.")
        job.start(["tune", "--resume", f"--out={name}"])


_folder = lru_cache(maxsize=4096)(RunFolder)  # its many paths take longer to make than a kept status to find


def summary(root: UiRoot, name: str) -> dict[str, Any]:
    """A line of the table of runs."""
    folder = _folder(root.path / name)
    seconds, scored = read_facts(folder.status).get("seconds"), stamp(folder.metrics)
    known = {"name": name, "state": state_of(root, name), "seconds": seconds if is_number(seconds) else None}
    return {**known, "changed": max(stamp(folder.status), scored)[0], **_scores(folder.metrics, scored)}


@lru_cache(maxsize=4096)
def _scores(path: Path, _stamp: object) -> dict[str, Any]:
    return leading_scores(read_facts(path))


def live(root: UiRoot, name: str) -> dict[str, Any]:
    """What is known of a run while it goes on; its folder may not be there yet."""
    folder, job = _folder(root.path / name), tuning(root, name)
    state, status, plan = state_of(root, name), folder.read_status(), read_facts(folder.plan)
    logs, charts = _logs(folder.root, tuple((arm, stamp(folder.losses(arm))) for arm in arms_in(folder.logs)))
    wanted = get(plan, "fit", "arms") or get(read_facts(folder.config), "eval", "arms")
    seconds, predicted = status.get("seconds"), get(plan, "predicted", "seconds")
    if state == "running" and is_number(seconds):  # the status is as old as the stage
        seconds += time.time() - stamp(folder.status)[0]
    left = max(0.0, predicted - seconds) if is_number(predicted) and is_number(seconds) else 0.0
    error = job.error() or (_fault(folder) or job.ended() if state == "failed" else "")
    return {
        "state": state,
        "active": state in ACTIVE,
        "stage": one_line(str(status.get("stage", "start"))),
        "seconds": seconds,
        "left": left,
        "error": KEPT if state == "interrupted" and "stopped" in error else one_line(error),
        "bars": _bars(mapping(plan, "arms"), logs, folder, wanted if isinstance(wanted, list) else []),
        "losses": charts,
        "rows": first_answers(folder, growing=state in ACTIVE),
        "notices": [one_line(str(x)) for x in rows_of(plan, "notices") if isinstance(x, str)][:50],
        "log": job.lines(),
        "exists": folder.status.exists(),
    }


def _fault(folder: RunFolder) -> str:
    """Why a run has failed: its error, or that its state cannot be read; empty where it has no folder."""
    try:
        found = folder.read(folder.status)
        return str(found.get("error") or ("" if found.get("state") in ENDED else f"{folder.status} names no state"))
    except TellError as error:
        return str(error) if folder.status.exists() else ""


@lru_cache(maxsize=64)
def _logs(path: Path, stamps: tuple[tuple[str, object], ...]) -> tuple[dict[str, list[dict]], dict[str, object] | None]:
    """Training logs and their charts, which take longer to draw than all else; drawn again when a log grows."""
    logs = {arm: rows for arm, _ in stamps if (rows := first_rows(RunFolder(path).losses(arm), MOST_ROWS))}
    return logs, losses(Run(RunFolder(path), logs=logs))


def _bars(planned: dict[str, Any], logs: dict[str, list[dict]], folder: RunFolder, wanted: list[Any]) -> list[dict]:
    bars = []
    for arm in arm_order(dict.fromkeys([*planned, *logs])):
        steps = get(planned, arm, "steps")
        done = logs[arm][-1].get("step", len(logs[arm])) if arm in logs else 0
        if is_number(steps) and steps > 0 and is_number(done):
            bars.append({"label": f"Train {label_of(arm)}", "done": min(done, steps), "total": steps, "unit": "steps"})
    if wanted:
        done = sum(folder.prediction(str(arm)).exists() for arm in wanted if str(arm) in ARMS)
        bars.append({"label": "Answer the test rows", "done": done, "total": len(wanted), "unit": "arms"})
    return bars


def study_line(root: UiRoot, name: str, runs: Set[str]) -> dict[str, Any]:
    """A study with the first of its cells, as they end, and the runs that are its cells."""
    folder, place = StudyFolder(root.path / name), os.path.normpath(f"{name}/../cells") + "/"
    line: dict[str, Any] = {"name": name, "error": "", "cells": [], "counts": {}, "runs": (), "hidden": 0}
    line["page"] = folder.page.is_file()
    try:
        found = mapping(folder.read(), "cells")
    except TellError as error:
        return {**line, "error": one_line(str(error))}
    counts = Counter(str(get(about, "state") or "waiting") for about in found.values())
    for cell, about in islice(found.items(), MOST_CELLS):
        seconds, said = (get(about, key, default="") for key in ("seconds", "error"))
        known = {"name": cell, "state": str(get(about, "state") or "waiting"), "error": one_line(str(said))}
        line["cells"].append({**known, "seconds": seconds, "run": place + cell if place + cell in runs else ""})
    line |= {"counts": counts, "hidden": len(found) - len(line["cells"])}
    return {**line, "runs": {place + cell for cell in found}}
