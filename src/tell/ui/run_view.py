"""Runs and studies as the page shows them, read from their folders alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tell.errors import TellError
from tell.files import parse_yaml, read_json
from tell.folder import RunFolder
from tell.metric_names import metric
from tell.names import ARMS, arm_order
from tell.number_text import is_number, show
from tell.report.read_run import Run, get, mapping, rows_of
from tell.report.score_tables import primary_metric
from tell.report.sections import losses
from tell.shown import one_line
from tell.studies.study_folder import StudyFolder
from tell.ui.jobs import Job
from tell.ui.ui_root import UiRoot

ACTIVE = ("starting", "running")
SHOWN, MOST_LINE, MOST_LOG = 3, 1 << 20, 16 << 20  # test rows; bytes of a row of predictions and of a training log
KEPT = "Stopped. Steps, arms and answers that were finished are kept; Resume goes on from there."


def held(path: Path) -> bool:
    """Whether a process holds a lock; asked for an instant, which those who take it wait for."""
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False


def state_of(folder: RunFolder, job: Job) -> str:
    """``starting``, ``running``, ``done``, ``interrupted`` or ``failed``.

    A run that was killed left ``running`` behind, but no process holds its lock.
    """
    state, process = folder.read_status().get("state"), job.process()
    if state == "running":
        return "running" if process is not None or held(folder.lock) else "interrupted"
    if process is not None and job.record()["created"] > _stamp(folder.status):
        return "starting"  # also a run that is being resumed
    return str(state) if state in ("done", "interrupted", "failed") else "failed"


def summary(root: UiRoot, name: str) -> dict[str, Any]:
    """A line of the table of runs."""
    folder = RunFolder(root.path / name)
    scores = _scores(folder.metrics, _stamp(folder.metrics))
    seconds = folder.read_status().get("seconds")
    changed = max(_stamp(folder.status), _stamp(folder.metrics))
    return {
        "name": name,
        "state": state_of(folder, tuning(root, name)),
        "seconds": seconds,
        "changed": changed,
        **scores,
    }


def tuning(root: UiRoot, name: str) -> Job:
    """The process of a run, where the page started it."""
    return Job(root, f"tune {name}")


def _stamp(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


@lru_cache(maxsize=4096)
def _scores(path: Path, _stamp: float) -> dict[str, Any]:
    """Score and general loss of the leading arm, next to the untuned model's; read again when the file changes."""
    none = {"metric": "", "score": None, "shown": "–", "base": "", "loss": None, "base_loss": None}
    try:
        found = read_json(path, remedy="")
    except (FileNotFoundError, TellError):
        return none
    name, arms = primary_metric(found), mapping(found, "arms")
    lead = next((arm for arm in ("tell", *arm_order(arms)) if arm in arms), "")
    if name is None:
        return none
    spec = metric(name)
    value, base = get(arms, lead, name, "value"), get(arms, "base", name, "value")
    sets = mapping(found, "forgetting", "arms")
    first = next(iter(mapping(sets, lead)), "")
    loss, before = (get(sets, arm, first, "loss", "value") for arm in (lead, "base"))
    return {
        "metric": spec.label,
        "score": value if is_number(value) else None,
        "shown": show(value, spec.unit),
        "base": show(base, spec.unit) if is_number(base) and lead != "base" else "",
        "loss": loss if is_number(loss) else None,
        "base_loss": before if is_number(before) else None,
    }


def live(root: UiRoot, name: str) -> dict[str, Any]:
    """What is known of a run while it goes on; its folder may not be there yet."""
    folder, job = RunFolder(root.path / name), tuning(root, name)
    state, status = state_of(folder, job), folder.read_status()
    plan, config = _json(folder.plan), _yaml(folder.config)
    logs, charts = _logs(folder.root, tuple((arm, _stamp(folder.losses(arm))) for arm in _arms(folder.logs)))
    wanted = get(plan, "fit", "arms") or get(config, "eval", "arms")
    error = job.error() or (str(status.get("error") or "") if state == "failed" else "")
    return {
        "name": name,
        "state": state,
        "active": state in ACTIVE,
        "stage": one_line(str(status.get("stage", "start"))),
        "seconds": status.get("seconds"),
        "error": KEPT if state == "interrupted" and "stopped" in error else one_line(error),
        "bars": _bars(mapping(plan, "arms"), logs, folder, wanted if isinstance(wanted, list) else []),
        "losses": charts,
        "rows": test_rows(folder),
        "notices": [one_line(str(x)) for x in rows_of(plan, "notices") if isinstance(x, str)][:50],
        "log": job.lines(),
        "mine": job.process() is not None,
        "exists": folder.status.exists(),
    }


@lru_cache(maxsize=64)
def _logs(path: Path, stamps: tuple[tuple[str, float], ...]) -> tuple[dict[str, list[dict]], dict[str, object] | None]:
    """Training logs and their charts, which take longer to draw than all else; drawn again when a log grows."""
    folder = RunFolder(path)
    logs = {arm: rows for arm, _ in stamps if (rows := log_rows(folder.losses(arm)))}
    return logs, losses(Run(folder, logs=logs))


def _bars(
    planned: Mapping[str, Any], logs: Mapping[str, list[dict]], folder: RunFolder, wanted: list[Any]
) -> list[dict[str, Any]]:
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


def log_rows(path: Path) -> list[dict]:
    """Rows of a log that is being written: its last line may not be whole yet."""
    rows = []
    try:
        with path.open("rb") as file:
            for line in file.read(MOST_LOG).splitlines():
                with suppress(ValueError, RecursionError):
                    if isinstance(row := json.loads(line), dict):
                        rows.append(row)
    except OSError:
        pass
    return rows


def test_rows(folder: RunFolder, shown: int = SHOWN) -> list[dict[str, Any]]:
    """The first test rows, with the answers of all arms that have answered."""
    rows: dict[str, dict[str, Any]] = {}
    for arm in _arms(folder.predictions):
        for row in _head(folder.prediction(arm), shown):
            key = str(row.get("hash"))
            if key not in rows and len(rows) == shown:
                continue
            text = {part: str(row.get(part) or "") for part in ("prompt", "reference", "answer")}
            known = rows.setdefault(key, {**text, "answers": []})
            known["answers"].append((_label(arm), text["answer"], arm == "tell"))
    return list(rows.values())


def _head(path: Path, most: int) -> list[dict]:
    try:
        with path.open("rb") as file:
            lines = [file.readline(MOST_LINE) for _ in range(most)]
    except OSError:
        return []
    rows = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, remedy="")
    except (FileNotFoundError, TellError):
        return {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = parse_yaml(path.read_text("utf-8"), where=path.name) if os.path.getsize(path) < MOST_LINE else {}
    except (OSError, ValueError, TellError):
        return {}
    return found if isinstance(found, dict) else {}


def study_line(root: UiRoot, name: str) -> dict[str, Any]:
    """A study with its cells, as they end."""
    folder = StudyFolder(root.path / name)
    try:
        found = folder.read()
    except TellError as error:
        return {"name": name, "error": one_line(str(error)), "cells": [], "counts": {}, "page": False}
    cells, counts = [], dict.fromkeys(("done", "running", "waiting", "failed"), 0)
    for cell, about in islice(found.get("cells", {}).items(), 10_000):
        about = about if isinstance(about, dict) else {}
        state = str(about.get("state", "waiting"))
        counts[state] = counts.get(state, 0) + 1
        path = folder.root.parent / "cells" / str(cell)
        inside = path.resolve().is_relative_to(root.path) and (path / "status.json").is_file()
        run = path.relative_to(root.path).as_posix() if inside else ""
        said = one_line(str(about.get("error") or ""))
        cells.append({"name": cell, "state": state, "seconds": about.get("seconds"), "error": said, "run": run})
    return {"name": name, "error": "", "cells": cells, "counts": counts, "page": folder.page.is_file()}
