"""A study read back: what every finished cell measured, and what is still missing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tell.errors import TellError
from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.names import is_number
from tell.report.read_run import get, mapping
from tell.run.answers import adapter_arm
from tell.score.intervals import Z
from tell.score.means import mean_metric
from tell.score.scored import Metric
from tell.score.scorers import make_scorer
from tell.studies.labels import BENCHMARK, canonical, told_apart
from tell.studies.stats.shared_rows import CHANGE, SharedRows, levels_and_changes, read_general_rows, read_questions

COSTS = ("steps", "tokens", "flops", "learning_rate", "seconds")  # as a run notes them


@dataclass(frozen=True)
class Number:
    """A measurement that is on no test row: a loss on general text, a benchmark.

    Attributes:
        value: the run's own.
        spread: standard error over the rows it was measured on, from the run's interval; 0 where it has none.
        ci: the run's interval, which may lie askew of the value.
        rows: what it is the mean of, where the run has kept that.
    """

    value: float
    spread: float
    ci: tuple[float, float] | None = None
    rows: SharedRows | None = None


@dataclass(frozen=True)
class Measured:
    """One arm of one cell.

    Attributes:
        hashes: (n,) content hashes of the test rows.
        metrics: name to Metric over these rows.
        numbers: name to Number: ``probe loss``, ``probe loss change``, benchmarks.
        costs: ``steps``, ``tokens``, ``flops``, ``learning_rate``, ``seconds`` of its training (0 where it has none);
            ``flops_6nd``, 6 times all parameters times tokens, as the paper counts (A.1); and ``eval_flops``, of
            answering the test rows.
        alone: it was trained on task rows without any general row.
    """

    hashes: np.ndarray
    metrics: Mapping[str, Metric]
    numbers: Mapping[str, Number]
    costs: Mapping[str, float]
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """One row of the study that has numbers; rows that share a cell share what it measured."""

    point: Mapping[str, Any]
    arm: str
    seed: int
    cell: str
    measured: Measured


@dataclass
class Study:
    """Everything the tables, fits and figures are made from.

    Attributes:
        cells: where the run folders are.
        outcomes: of the finished cells, in the order of the study's rows.
        states: state to number of cells.
        failed: cell to its error.
        missing: state (or ``unreadable``) to number of rows of the study that have no numbers.
        primary: the task's primary metric.
        keys: grid keys that take more than one value.
        benchmarks: those that some cell was asked; a group of tasks is one.
        machines: device and number format, as ``cpu bf16``, to the number of rows measured so.
        weights: model to the fingerprints of what lay under its name, to the number of rows measured with each.
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
        """Names to tabulate: those the recipe asks for and some cell has, else the primary one."""
        wanted: list[str] = []
        for name in map(canonical, self.recipe.get("metrics") or [self.primary]):
            wanted += [BENCHMARK + task for task in self.benchmarks] if name == "benchmarks" else [name]
        return [name for name in dict.fromkeys(wanted) if name in self.known()]

    def known(self) -> set[str]:
        """Every metric and number that some outcome has."""
        return {name for o in self.outcomes for name in (*o.measured.metrics, *o.measured.numbers)}

    def without_general_rows(self) -> bool:
        """Whether some outcome has a loss on general text without its rows, so that it cannot be paired."""
        losses = [n for o in self.outcomes for name, n in o.measured.numbers.items() if name.endswith(" loss")]
        return any(number.rows is None for number in losses)


def read_results(folder: str | Path, cells: str | Path | None = None) -> Study:
    """Read a study's finished cells.

    Args:
        folder: the study's own, with ``study.json``.
        cells: where the run folders are; default: below the ``root`` that ``study.json`` names, else ``../cells``.

    Returns:
        The study; rows whose cell is waiting, running, failed or unreadable are left out and counted.

    Raises:
        TellError: ``study.json`` is missing or no study.
    """
    folder = Path(folder)
    path = folder / "study.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows, states = data["rows"], data["cells"]
    except FileNotFoundError as error:
        raise TellError("no such file", where=str(path), remedy="Give a folder made by `tell study`.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TellError(f"is no study ({error})", where=str(path), remedy="Run `tell study` again.") from error
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
    open_cell = lru_cache(maxsize=None)(lambda name: _Cell.read(root / name))
    primaries: Counter[str] = Counter()
    for row in study.rows:
        state = str((states.get(row["cell"]) or {}).get("state", "waiting"))
        if state == "done":
            cell = open_cell(row["cell"])
            measured = cell.arm(row["arm"]) if cell else None
            if cell and measured:
                study.outcomes.append(Outcome(row["point"], row["arm"], int(row["seed"]), row["cell"], measured))
                study.machines.update(filter(None, [cell.machine]))
                if cell.fingerprint:
                    study.weights.setdefault(cell.model, Counter())[cell.fingerprint] += 1
                primaries[str(get(cell.metrics, "task", "primary", default=""))] += 1
                tasks = mapping(cell.metrics, "benchmarks", "settings", "tasks")
                study.benchmarks = tuple(dict.fromkeys([*study.benchmarks, *tasks]))
                continue
            state = "failed" if cell and row["arm"] in mapping(cell.metrics, "failed") else "unreadable"
            if state == "failed":
                study.failed[row["cell"]] = str(cell.metrics["failed"][row["arm"]])
        study.missing[state] += 1
    study.primary = primaries.most_common(1)[0][0] if primaries else ""
    study.keys = tuple(
        key
        for key in dict.fromkeys(k for row in study.rows for k in row["point"])
        if len({frozen(row["point"].get(key)) for row in study.rows}) > 1
    )
    for key, names in told_apart([row["point"] for row in study.rows], study.keys).items():
        for point in (row["point"] for row in study.rows):  # those of the outcomes
            if isinstance(point.get(key), str):
                point[key] = names.get(point[key], point[key])
    return study


def number_of(value: Any) -> Any:
    """YAML 1.1 reads 1e4 as a text; a text that is a number becomes one, a whole float an integer."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_change(study: Study, metric: str) -> str:
    """A loss on general text or a benchmark as its change from the untuned model, on the same rows: the level adds the
    same to all that are compared, and only widens the intervals. Other metrics stay."""
    metric = canonical(metric)
    return metric + CHANGE if metric + CHANGE in study.known() else metric


def as_drawn(study: Study, metric: str) -> str:
    """`as_change` for losses; benchmarks are looked at as they are."""
    metric = canonical(metric)
    return as_change(study, metric) if metric.endswith(" loss") else metric


def frozen(value: Any) -> str:
    """A key for a value of the grid, or a whole point."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


@dataclass
class _Cell:
    folder: RunFolder
    metrics: dict[str, Any]
    arms: dict[str, Measured | None] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> _Cell | None:
        folder = RunFolder(root)
        try:
            return cls(folder, json.loads(folder.metrics.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def arm(self, arm: str) -> Measured | None:
        if arm not in self.arms:
            try:
                self.arms[arm] = self._read(arm)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                self.arms[arm] = None
        return self.arms[arm]

    def _read(self, arm: str) -> Measured | None:
        entries = mapping(self.metrics, "arms", arm)
        if not entries:
            return None
        path = self.folder.prediction(arm)
        rows = read_jsonl(path) if path.is_file() else []
        metrics, rest = _metrics(entries, rows, lambda: self._rescore(rows))
        trained = mapping(self.metrics, "train", "arms", adapter_arm(arm) or "")
        costs = {key: float(trained.get(key) or 0) for key in COSTS}
        costs["flops_6nd"] = 6.0 * self.parameters * costs["tokens"]
        costs["eval_flops"] = float(get(self.metrics, "eval", "arms", arm, "flops", default=0) or 0)
        hashes = np.array([str(row["hash"]) for row in rows], dtype=str)
        mixed = mapping(self.metrics, "mixture", "rows")
        return Measured(hashes, metrics, rest | self._numbers(arm), costs, bool(mixed) and not mixed.get("general"))

    @cached_property
    def plan(self) -> dict[str, Any]:
        return _read(self.folder.plan)

    @cached_property
    def findings(self) -> dict[str, Any]:
        return _read(self.folder.findings)

    @property
    def parameters(self) -> float:
        """Of the base model; 0 where the run does not say."""
        return float(get(self.plan, "model", "parameters", default=0) or 0)

    @property
    def fingerprint(self) -> str:
        """Of the model's files; empty where the run does not say."""
        return str(get(self.findings, "machine", "model_fingerprint", default=""))

    @property
    def model(self) -> str:
        """Its name."""
        return str(get(self.plan, "model", "name", default="the model"))

    @property
    def machine(self) -> str:
        """Device and number format, ``cpu bf16``; empty where the run does not say."""
        known = mapping(self.findings, "machine")
        return " ".join(str(known[key]) for key in ("device", "dtype") if key in known)

    def _rescore(self, rows: Sequence[dict]) -> Mapping[str, Metric]:
        """Metrics of the corpus, which no score of a row adds up to, from the answers."""
        kind = get(self.metrics, "task", "kind")
        if kind not in ("text", "label"):
            return {}
        labels = get(self.findings, "kind", "labels") or sorted({str(row["reference"]) for row in rows})
        return make_scorer(kind, labels=labels).score([r["answer"] for r in rows], [r["reference"] for r in rows])

    def _numbers(self, arm: str) -> dict[str, Number]:
        """Losses on general text and benchmarks, as levels and as changes from the untuned model."""
        weights = adapter_arm(arm) or "base"
        found: dict[str, Number] = {}

        def add(name: str, level: Any, change: Any) -> None:
            if (number := _number(level)) is not None:
                found[name] = number
                if weights == "base":
                    found[name + CHANGE] = Number(0.0, 0.0)
            if (number := _number(change)) is not None:
                found[name + CHANGE] = number

        def keep(name: str, own: SharedRows | None, base: SharedRows | None) -> None:
            for key, rows in levels_and_changes(own, base).items():
                known = found.get(name + key)
                if known is not None and _equal(rows.metric.value, known.value):
                    found[name + key] = replace(known, rows=rows)

        own_rows, base_rows = (read_general_rows(self.folder, arm) for arm in (weights, "base"))
        differences = mapping(self.metrics, "forgetting", "differences", f"{weights} - base")
        for name, measures in mapping(self.metrics, "forgetting", "arms", weights).items():
            for measure, entry in mapping(measures).items():
                add(f"{name} {measure.replace('_', ' ')}", entry, get(differences, name, measure))
            keep(f"{name} loss", own_rows.get(name), base_rows.get(name))
        asked = mapping(self.metrics, "benchmarks", "arms")
        own = arm if arm in asked else weights  # where the anchor is on, arms of the same weights differ
        differences = mapping(self.metrics, "benchmarks", "differences", f"{own} - base")
        tasks = mapping(self.metrics, "benchmarks", "settings", "tasks")
        own_rows, base_rows = (read_questions(self.folder, each, tasks) for each in (own, "base"))
        for name, entry in mapping(asked, own).items():
            add(BENCHMARK + name, entry, get(differences, name))
            keep(BENCHMARK + name, own_rows.get(name), base_rows.get(name))
        return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _metrics(
    entries: Mapping[str, Any], rows: Sequence[dict], rescore: Callable[[], Mapping[str, Metric]]
) -> tuple[dict[str, Metric], dict[str, Number]]:
    """Metrics over rows, and those that only the run as a whole has."""
    metrics: dict[str, Metric] = {}
    numbers: dict[str, Number] = {}
    again: Mapping[str, Metric] | None = None
    for name, entry in entries.items():
        number = _number(entry)
        if number is None:
            continue
        values = np.array([float(mapping(row, "scores").get(name, np.nan)) for row in rows])
        metric = mean_metric(values, binary=_binary(values)) if np.isfinite(values).any() else None
        if metric is None or not _equal(metric.value, number.value):
            again = rescore() if again is None and rows else again
            metric = (again or {}).get(name)
        if metric is not None and _equal(metric.value, number.value):
            metrics[name] = metric
        else:
            numbers[name] = number
    return metrics, numbers


def _equal(a: float, b: float) -> bool:
    return bool(abs(a - b) <= 2e-5 * max(1.0, abs(b)))


def _binary(values: Iterable[float]) -> bool:
    known = np.asarray(values)
    return bool(np.isin(known[np.isfinite(known)], (0.0, 1.0)).all())


def _number(entry: Any) -> Number | None:
    value, ci = get(entry, "value"), get(entry, "ci")
    if not is_number(value):
        return None
    known = isinstance(ci, list) and len(ci) == 2 and all(map(is_number, ci))
    if not known:
        return Number(float(value), 0.0)
    return Number(float(value), (ci[1] - ci[0]) / (2 * Z), (float(ci[0]), float(ci[1])))
