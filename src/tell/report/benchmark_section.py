"""Benchmarks of general ability in the report: each with its change from the untuned model, and all their tasks."""

from __future__ import annotations

from typing import Any

from tell.report.glossary import Term, arm_order
from tell.report.read_run import get, mapping
from tell.report.score_tables import MINUS, Cell, Grid, Plotted, before_and_after

ABOUT = "Share of the benchmark's questions answered right, by lm-evaluation-harness."


def benchmark_tables(metrics: dict[str, Any]) -> list[Plotted]:
    """A table for each benchmark asked for; a group's score is the mean over its tasks."""
    asked, arms = mapping(metrics, "benchmarks", "settings", "tasks"), mapping(metrics, "benchmarks", "arms")
    differences = mapping(metrics, "benchmarks", "differences")
    tables = []
    for name, tasks in asked.items():
        what = Term(name, "share", ABOUT)
        cells = {
            arm: Cell.of(arms[arm][name], "share") for arm in arm_order(list(arms)) if get(arms, arm, name) is not None
        }
        if cells:
            changes = {arm: get(differences, f"{arm}{MINUS}base", name) for arm in cells}
            tables.append(
                before_and_after(what, cells, changes, higher=True, heading=name, note=_note(metrics, name, tasks))
            )
    return tables


def benchmark_grid(metrics: dict[str, Any]) -> Grid | None:
    """Every task and measure of the harness, a column an arm; None where no benchmark has several."""
    asked, arms = mapping(metrics, "benchmarks", "settings", "tasks"), mapping(metrics, "benchmarks", "arms")
    columns = arm_order(list(arms))
    names = dict.fromkeys(name for arm in columns for name in mapping(arms, arm))
    grid = Grid([Term(arm, "share", "") for arm in columns])
    for name in names:
        if name not in asked:
            grid.rows.append((name, [Cell.of(get(arms, arm, name), "share") for arm in columns]))
    return grid if grid.rows else None


def _note(metrics: dict[str, Any], name: str, tasks: Any) -> str:
    """How it was asked: tasks, shots, limit, anchor, the harness's version."""
    settings = mapping(metrics, "benchmarks", "settings")
    tasks = tasks if isinstance(tasks, list) else [name]
    shots = sorted({mapping(settings, "shots").get(task, 0) for task in tasks})
    limit = settings.get("limit")
    parts = [
        f"the mean over {len(tasks)} tasks" if len(tasks) > 1 else "",
        f"{' or '.join(map(str, shots))} shots",
        f"at most {limit} questions of each task" if limit else "",
        "as chat" if settings.get("chat") else "",
        "with the anchor on tuned arms" if settings.get("anchor") else "",
        f"lm-evaluation-harness {settings.get('harness', '')}".strip(),
    ]
    text = ", ".join(filter(None, parts))
    return f"{text[0].upper()}{text[1:]}."
