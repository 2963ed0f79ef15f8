"""Results of a study: the measurements of every finished cell, and what is still missing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tell.errors import TellError
from tell.metric_names import BENCHMARK, CHANGE, LOSS, canonical
from tell.report.read_run import get, mapping
from tell.studies.labels import unique_labels
from tell.studies.measured import CellReader, Measured
from tell.studies.packed import unpacked
from tell.studies.study_folder import StudyFolder


@dataclass(frozen=True)
class Outcome:
    """One row of the study that has numbers; rows that share a cell share its measurements."""

    point: Mapping[str, Any]
    arm: str
    seed: int
    cell: str
    measured: Measured

    def has(self, values: Mapping[str, object]) -> bool:
        """Whether its point has these values."""
        return all(frozen(self.point.get(key)) == frozen(value) for key, value in values.items())


@dataclass
class Study:
    """The input of tables, fits and figures.

    Attributes:
        cells: where the run folders are.
        outcomes: of the finished cells, in the order of the study's rows.
        states: state to number of cells.
        failed: cell to its error.
        missing: state (or ``unreadable``) to number of rows of the study that have no numbers.
        primary: the task's primary metric.
        keys: grid keys that take more than one value.
        benchmarks: those that some cell ran; a group of tasks is one.
        machines: device and number format, as ``cpu bf16``, to the number of rows measured so.
        weights: model to the fingerprints of its files, to the number of rows measured with each.
    """

    folder: Path
    cells: Path
    title: str
    claim: str
    recipe: dict[str, Any]
    created: str
    rows: list[dict[str, Any]]
    outcomes: list[Outcome] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    missing: Counter[str] = field(default_factory=Counter)
    primary: str = ""
    keys: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    machines: Counter[str] = field(default_factory=Counter)
    weights: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return sorted({o.seed for o in self.outcomes})

    def metrics(self) -> list[str]:
        """Metrics to tabulate: those that the recipe requests and some cell has, else the primary one."""
        wanted: list[str] = []
        for name in map(canonical, self.recipe.get("metrics") or [self.primary]):
            wanted += [BENCHMARK + task for task in self.benchmarks] if name == "benchmarks" else [name]
        return [name for name in dict.fromkeys(wanted) if name in self.known()]

    def known(self) -> set[str]:
        """Every metric and number that some outcome has."""
        return {name for o in self.outcomes for name in (*o.measured.metrics, *o.measured.numbers)}

    def without_general_rows(self) -> bool:
        """Whether some outcome has a loss on general text without its rows, so that it cannot be paired."""
        losses = [n for o in self.outcomes for name, n in o.measured.numbers.items() if name.endswith(LOSS)]
        return any(number.rows is None for number in losses)

    def add(self, row: Mapping[str, Any], cell: CellReader | None) -> bool:
        """Add a row of a finished cell: as an outcome, or as missing if its numbers cannot be read (False)."""
        measured = cell.arm(row["arm"]) if cell else None
        if cell is None or measured is None:
            error = mapping(cell.metrics, "failed").get(row["arm"]) if cell else None
            self.missing["unreadable" if error is None else "failed"] += 1
            if error is not None:
                self.failed[row["cell"]] = str(error)
            return False
        self.outcomes.append(Outcome(row["point"], row["arm"], int(row["seed"]), row["cell"], measured))
        self.machines.update(filter(None, [cell.machine]))
        if cell.fingerprint:
            self.weights.setdefault(cell.model, Counter())[cell.fingerprint] += 1
        tasks = mapping(cell.metrics, "benchmarks", "settings", "tasks")
        self.benchmarks = tuple(dict.fromkeys([*self.benchmarks, *tasks]))
        return True


def read_results(folder: str | Path, cells: str | Path | None = None) -> Study:
    """Read a study's finished cells: from their run folders, or packed ones where no metrics.json can be read there.

    Args:
        folder: the study's own, with ``study.json``.
        cells: where the run folders are; default: below the ``root`` that ``study.json`` names, else ``../cells``.

    Returns:
        The study; rows whose cell is waiting, running, failed or unreadable are left out and counted.

    Raises:
        TellError: ``study.json`` or ``cells.jsonl.gz`` is missing or damaged.
    """
    folder = Path(folder)
    path = folder / "study.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows, states = data["rows"], data["cells"]
    except FileNotFoundError as error:
        raise TellError("no such file", where=str(path), remedy="Name a folder made by `tell study`.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TellError(f"is not a study ({error})", where=str(path), remedy="Run `tell study` again.") from error
    root = Path(cells) if cells is not None else folder / str(data.get("root", "..")) / "cells"
    study = Study(
        folder=folder,
        cells=root,
        title=str(data.get("title") or folder.resolve().name),
        claim=str(data.get("claim") or ""),
        recipe=dict(data.get("recipe") or {}),
        created=str(data.get("created") or ""),
        rows=[{**row, "point": {k: number_of(v) for k, v in row["point"].items()}} for row in rows],
        states=Counter(str(c.get("state", "waiting")) for c in states.values()),
        failed={name: str(c.get("error") or "") for name, c in states.items() if c.get("state") == "failed"},
    )
    primaries: Counter[str] = Counter()
    own = cache(lambda name: CellReader.open(root / name))
    with unpacked(StudyFolder(folder).packed, lambda name: own(name) is None) as packed:
        open_cell = cache(lambda name: own(name) or CellReader.open(packed / name))
        for row in study.rows:
            state = str((states.get(row["cell"]) or {}).get("state", "waiting"))
            if state != "done":
                study.missing[state] += 1
            elif study.add(row, cell := open_cell(row["cell"])) and cell:
                primaries[str(get(cell.metrics, "task", "primary", default=""))] += 1
    study.primary = primaries.most_common(1)[0][0] if primaries else ""
    points = [row["point"] for row in study.rows]  # those of the outcomes too
    keys = dict.fromkeys(key for point in points for key in point)
    study.keys = tuple(key for key in keys if len({frozen(point.get(key)) for point in points}) > 1)
    for key, names in unique_labels(points, study.keys).items():
        for point in points:
            if isinstance(point.get(key), str):
                point[key] = names.get(point[key], point[key])
    return study


def number_of(value: object) -> Any:
    """YAML 1.1 reads 1e4 as a text; a text that is a number becomes one, a whole float an integer."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_change(study: Study, metric: str) -> str:
    """A loss on general text or a benchmark as its change from the untuned model on the same rows, where that is known:
    the level is common to all arms and only widens the intervals. Other metrics stay."""
    metric = canonical(metric)
    return metric + CHANGE if metric + CHANGE in study.known() else metric


def as_drawn(study: Study, metric: str) -> str:
    """`as_change` for losses; benchmarks are drawn as they are."""
    metric = canonical(metric)
    return as_change(study, metric) if metric.endswith(LOSS) else metric


def frozen(value: object) -> str:
    """A hashable key for a value of the grid, or a whole point."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
