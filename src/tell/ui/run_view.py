"""Runs and studies as the page shows them, read from their folders alone."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from tell.errors import TellError
from tell.folder import RunFolder
from tell.metric_names import metric
from tell.names import ARMS, arm_order
from tell.number_text import is_number, show
from tell.report.read_run import Run, get, mapping, rows_of
from tell.report.score_tables import primary_metric
from tell.report.sections import losses
from tell.run.claim import is_held
from tell.run.growing import SHOWN
from tell.shown import one_line
from tell.studies.study_folder import StudyFolder
from tell.ui.jobs import Job
from tell.ui.ui_root import UiRoot, read_facts

ACTIVE = ("starting", "running")
MOST_LINE, MOST_ROWS = 1 << 20, 100_000  # bytes of a row of predictions, rows of a training log
KEPT = "Stopped. Steps, arms and answers that were finished are kept; Resume goes on from there."


def tuning(root: UiRoot, name: str) -> Job:
    """The process of a run, where the page started it."""
    return Job(root, f"tune {name}")


def state_of(root: UiRoot, name: str) -> str:
    """``starting``, ``running``, ``done``, ``interrupted`` or ``failed``.

    A run that was killed left ``running`` behind, but no process holds its lock.
    """
    folder, job = RunFolder(root.path / name), tuning(root, name)
    state, process = folder.read_status().get("state"), job.process()
    if state == "running":
        return "running" if process is not None or is_held(folder) else "interrupted"
    if process is not None and job.record()["created"] > _stamp(folder.status):
        return "starting"  # also a run that is being resumed
    return str(state) if state in ("done", "interrupted", "failed") else "failed"


def summary(root: UiRoot, name: str) -> dict[str, Any]:
    """A line of the table of runs."""
    folder = RunFolder(root.path / name)
    changed = max(_stamp(folder.status), _stamp(folder.metrics))
    known = {"name": name, "state": state_of(root, name), "seconds": folder.read_status().get("seconds")}
    return {**known, "changed": changed, **_scores(folder.metrics, _stamp(folder.metrics))}


def _stamp(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


@lru_cache(maxsize=4096)
def _scores(path: Path, _stamp: float) -> dict[str, Any]:
    """Score and general loss of the leading arm, next to the untuned model's; read again when the file changes."""
    found = read_facts(path)
    name, arms, sets = primary_metric(found), mapping(found, "arms"), mapping(found, "forgetting", "arms")
    lead = next((arm for arm in ("tell", *arm_order(arms)) if arm in arms), "")
    spec, first = metric(name) if name else None, next(iter(mapping(sets, lead)), "")
    values = [get(arms, arm, name or "", "value") for arm in (lead, "base")]
    values += [get(sets, arm, first, "loss", "value") for arm in (lead, "base")]
    score, base, loss, base_loss = (value if is_number(value) else None for value in values)
    shown, before = ("" if spec is None or value is None else show(value, spec.unit) for value in (score, base))
    label = spec.label if spec and shown else ""
    return {"score": score, "shown": shown, "base": before, "metric": label, "loss": loss, "base_loss": base_loss}


def live(root: UiRoot, name: str) -> dict[str, Any]:
    """What is known of a run while it goes on; its folder may not be there yet."""
    folder, job = RunFolder(root.path / name), tuning(root, name)
    state, status, plan = state_of(root, name), folder.read_status(), read_facts(folder.plan)
    logs, charts = _logs(folder.root, tuple((arm, _stamp(folder.losses(arm))) for arm in _arms(folder.logs)))
    wanted = get(plan, "fit", "arms") or get(read_facts(folder.config), "eval", "arms")
    seconds, predicted = status.get("seconds"), get(plan, "predicted", "seconds")
    if state == "running" and is_number(seconds):  # the status is as old as the stage
        with suppress(OSError):
            seconds += time.time() - folder.status.stat().st_mtime
    left = max(0.0, predicted - seconds) if is_number(predicted) and is_number(seconds) else 0.0
    error = job.error() or (str(status.get("error") or "") if state == "failed" else "")
    return {
        "state": state,
        "active": state in ACTIVE,
        "stage": one_line(str(status.get("stage", "start"))),
        "seconds": seconds,
        "left": left,
        "error": KEPT if state == "interrupted" and "stopped" in error else one_line(error),
        "bars": _bars(mapping(plan, "arms"), logs, folder, wanted if isinstance(wanted, list) else []),
        "losses": charts,
        "rows": test_rows(folder, growing=state in ACTIVE),
        "notices": [one_line(str(x)) for x in rows_of(plan, "notices") if isinstance(x, str)][:50],
        "log": job.lines(),
        "exists": folder.status.exists(),
    }


@lru_cache(maxsize=64)
def _logs(path: Path, stamps: tuple[tuple[str, float], ...]) -> tuple[dict[str, list[dict]], dict[str, object] | None]:
    """Training logs and their charts, which take longer to draw than all else; drawn again when a log grows."""
    logs = {arm: rows for arm, _ in stamps if (rows := _rows(RunFolder(path).losses(arm), MOST_ROWS))}
    return logs, losses(Run(RunFolder(path), logs=logs))


def _bars(planned: dict[str, Any], logs: dict[str, list[dict]], folder: RunFolder, wanted: list[Any]) -> list[dict]:
    bars = []
    for arm in arm_order(dict.fromkeys([*planned, *logs])):
        steps = get(planned, arm, "steps")
        done = logs[arm][-1].get("step", len(logs[arm])) if arm in logs else 0
        if is_number(steps) and steps > 0 and is_number(done):
            bars.append({"label": f"Train {_label(arm)}", "done": min(done, steps), "total": steps, "unit": "steps"})
    if wanted:
        done = sum(folder.prediction(str(arm)).exists() for arm in wanted if str(arm) in ARMS)
        bars.append({"label": "Answer the test rows", "done": done, "total": len(wanted), "unit": "arms"})
    return bars


def _label(arm: str) -> str:
    return ARMS[arm].label if arm in ARMS else one_line(arm)


def _arms(folder: Path) -> list[str]:
    return arm_order({path.stem: path for path in folder.glob("*.jsonl")}) if folder.is_dir() else []


def test_rows(folder: RunFolder, *, growing: bool = False) -> list[dict[str, Any]]:
    """The first test rows, with the answers of all arms that have answered and, if wanted, of the one that does now."""
    found = [(arm, row, False) for arm in _arms(folder.predictions) for row in _rows(folder.prediction(arm), SHOWN)]
    now = read_facts(folder.answering) if growing else {}
    found += [(str(now.get("arm")), row, True) for row in rows_of(now, "rows") if isinstance(row, dict)]
    rows: dict[str, dict[str, Any]] = {}
    for arm, row, grows in found:
        text = {part: str(row.get(part) or "") for part in ("prompt", "reference", "answer")}
        if (key := str(row.get("hash"))) in rows or len(rows) < SHOWN:
            known = rows.setdefault(key, {**text, "answers": []})
            known["answers"].append((_label(arm), text["answer"], grows))
    return list(rows.values())


def _rows(path: Path, most: int) -> list[dict]:
    """The first rows of a file that is being written: its last line may not be whole yet."""
    rows = []
    with suppress(OSError), path.open("rb") as file:
        for line in islice(iter(lambda: file.readline(MOST_LINE), b""), most):
            with suppress(ValueError, RecursionError):
                if isinstance(row := json.loads(line), dict):
                    rows.append(row)
    return rows


def study_line(root: UiRoot, name: str) -> dict[str, Any]:
    """A study with its cells, as they end."""
    folder = StudyFolder(root.path / name)
    line: dict[str, Any] = {"name": name, "error": "", "cells": [], "counts": {}, "page": folder.page.is_file()}
    try:
        found = mapping(folder.read(), "cells")
    except TellError as error:
        return {**line, "error": one_line(str(error))}
    for cell, about in islice(found.items(), 10_000):
        state, seconds, said = (get(about, key, default="") for key in ("state", "seconds", "error"))
        state = str(state or "waiting")
        line["counts"][state] = line["counts"].get(state, 0) + 1
        path = folder.root.parent / "cells" / str(cell)
        inside = path.resolve().is_relative_to(root.path) and (path / "status.json").is_file()
        known = {"name": cell, "state": state, "seconds": seconds, "error": one_line(str(said))}
        line["cells"].append({**known, "run": root.name(path) if inside else ""})
    return line
