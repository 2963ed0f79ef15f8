"""Notices of what a run dropped, guessed or shrank, as listed at the end of its output and on its page."""

from __future__ import annotations

from typing import Any

from tell.report.read_run import mapping, rows_of
from tell.shown import left_out


def run_notices(findings: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """One sentence per notice, from findings.json and run.yaml: guesses, rows left out, then the run's own notices."""
    return [*_guesses(findings, config), *_dropped(findings), *map(str, rows_of(findings, "notices"))]


def _guesses(findings: dict[str, Any], config: dict[str, Any]) -> list[str]:
    task, data, kind, split = mapping(config, "task"), *(mapping(findings, k) for k in ("data", "kind", "split"))
    out = []
    if data.get("layout") and not task.get("columns") and not data.get("form"):  # a guessed form has its own notice
        columns = ", ".join(f"{part} from {column}" for part, column in mapping(data, "columns").items())
        out.append(f"guessed from the data: layout {data['layout']}" + (f" ({columns})" if columns else ""))
    if kind.get("why") and task.get("kind", "auto") == "auto":
        out.append(f"guessed from the answers: {kind['why']}")
    if data.get("layout") and not findings.get("test") and split.get("test"):
        out.append(f"no test file was given: {split['test']} rows were split off, drawn by the seed")
    return out


def _dropped(findings: dict[str, Any]) -> list[str]:
    rows = [row for row in rows_of(findings, "dropped_rows") if isinstance(row, dict)]
    return left_out((str(row.get("origin", "")), str(row.get("reason", ""))) for row in rows)
