"""Benchmarks of general ability in the report: each with its change from the untuned model, and all their tasks."""

from __future__ import annotations

from typing import Any

from tell.metric_names import BENCHMARK, MetricSpec, metric
from tell.names import arm_order
from tell.report.read_run import get, mapping
from tell.report.score_tables import MINUS, Cell, Grid, Plotted, before_and_after


def benchmark_tables(metrics: dict[str, Any]) -> list[Plotted]:
    """A table for each requested benchmark; a group's score is the mean over its tasks."""
    arms, differences = (mapping(metrics, "benchmarks", part) for part in ("arms", "differences"))
    tables = []
    for name, tasks in mapping(metrics, "benchmarks", "settings", "tasks").items():
        what = metric(BENCHMARK + name)
        found = {key: get(arms, key, name) for key in arm_order(arms)}
        cells = {key: Cell.of(entry, what.unit) for key, entry in found.items() if entry is not None}
        if cells:
            changes = {key: get(differences, f"{key}{MINUS}base", name) for key in cells}
            table = before_and_after(what, cells, changes)
            table.heading, table.note = name, _note(metrics, name, tasks)
            tables.append(table)
    return tables


def benchmark_grid(metrics: dict[str, Any]) -> Grid | None:
    """Every task and measure of the harness, a column per arm; None if no benchmark has several."""
    asked, arms = mapping(metrics, "benchmarks", "settings", "tasks"), mapping(metrics, "benchmarks", "arms")
    columns = arm_order(arms)
    names = dict.fromkeys(name for key in columns for name in mapping(arms, key))
    rows = [(name, [Cell.of(get(arms, key, name), "share") for key in columns]) for name in names if name not in asked]
    return Grid([MetricSpec(key, key, "share") for key in columns], rows) if rows else None


def _note(metrics: dict[str, Any], name: str, tasks: object) -> str:
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
