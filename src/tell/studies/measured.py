"""Measurements of a finished cell by arm, read from the files in its run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.metric_names import BENCHMARK, CHANGE
from tell.number_text import has_interval, is_number
from tell.report.arm_rows import agrees, rescorer, row_metrics
from tell.report.read_run import Run, get, mapping
from tell.run.answers import adapter_arm
from tell.score.intervals import Z
from tell.score.scored import Metric
from tell.studies.stats.shared_rows import SharedRows, levels_and_changes, read_general_rows, read_questions

COSTS = ("steps", "tokens", "flops", "learning_rate", "seconds")  # as a run records them


@dataclass(frozen=True)
class Number:
    """A measurement that is not on test rows: a loss on general text, a benchmark.

    Attributes:
        value: the run's own.
        spread: standard error over the rows it was measured on, from the run's interval; 0 where it has none.
        ci: the run's interval, which need not be symmetric.
        rows: the rows that it is the mean of, where the run kept them.
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
        alone: it was trained on task rows without general rows.
    """

    hashes: np.ndarray
    metrics: Mapping[str, Metric]
    numbers: Mapping[str, Number]
    costs: Mapping[str, float]
    alone: bool = False

    def __contains__(self, metric: str) -> bool:
        return metric in self.metrics or metric in self.numbers

    def value(self, metric: str) -> float:
        return self.metrics[metric].value if metric in self.metrics else self.numbers[metric].value


@dataclass
class CellReader:
    """The run folder of a finished cell."""

    folder: RunFolder
    metrics: dict[str, Any]
    arms: dict[str, Measured | None] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path) -> CellReader | None:
        """None where its metrics cannot be read."""
        try:
            return cls(RunFolder(root), json.loads(RunFolder(root).metrics.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def arm(self, arm: str) -> Measured | None:
        """Measurements of an arm; None where they cannot be read."""
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
        # packed cells have no schema, and are to give what their folders gave
        score = rescorer(Run(self.folder, metrics=self.metrics, findings=self.findings), with_schema=False)
        metrics = row_metrics(entries, rows, score)
        rest = {name: _number(entry) for name, entry in entries.items() if name not in metrics}
        numbers = {name: number for name, number in rest.items() if number is not None}
        trained = mapping(self.metrics, "train", "arms", adapter_arm(arm) or "")
        costs = {key: float(trained.get(key) or 0) for key in COSTS}
        costs["flops_6nd"] = 6.0 * float(get(self.plan, "model", "parameters", default=0) or 0) * costs["tokens"]
        costs["eval_flops"] = float(get(self.metrics, "eval", "arms", arm, "flops", default=0) or 0)
        hashes = np.array([str(row["hash"]) for row in rows], dtype=str)
        mixed = mapping(self.metrics, "mixture", "rows")
        return Measured(hashes, metrics, numbers | self._numbers(arm), costs, bool(mixed) and not mixed.get("general"))

    plan = cached_property(lambda self: _read_json(self.folder.plan))
    findings = cached_property(lambda self: _read_json(self.folder.findings))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model's files; empty where the run did not record it."""
        return str(get(self.findings, "machine", "model_fingerprint", default=""))

    @property
    def model(self) -> str:
        """Its name."""
        return str(get(self.plan, "model", "name", default="the model"))

    @property
    def machine(self) -> str:
        """Device and number format, ``cpu bf16``; empty where the run did not record them."""
        known = mapping(self.findings, "machine")
        return " ".join(str(known[key]) for key in ("device", "dtype") if key in known)

    def _numbers(self, arm: str) -> dict[str, Number]:
        """Losses on general text and benchmarks, as levels and as changes from the untuned model."""
        weights = adapter_arm(arm) or "base"
        found: dict[str, Number] = {}

        def add(name: str, level: object, change: object) -> None:
            if (number := _number(level)) is not None:
                found[name] = number
                if weights == "base":
                    found[name + CHANGE] = Number(0.0, 0.0)
            if (number := _number(change)) is not None:
                found[name + CHANGE] = number

        def keep(name: str, own: SharedRows | None, base: SharedRows | None) -> None:
            for key, rows in levels_and_changes(own, base).items():
                known = found.get(name + key)
                if known is not None and agrees(rows.metric.value, known.value):
                    found[name + key] = replace(known, rows=rows)

        own_rows, base_rows = (read_general_rows(self.folder, each) for each in (weights, "base"))
        differences = mapping(self.metrics, "forgetting", "differences", f"{weights} - base")
        for name, measures in mapping(self.metrics, "forgetting", "arms", weights).items():
            for measure, entry in mapping(measures).items():
                add(f"{name} {measure.replace('_', ' ')}", entry, get(differences, name, measure))
            keep(f"{name} loss", own_rows.get(name), base_rows.get(name))
        asked = mapping(self.metrics, "benchmarks", "arms")
        own = arm if arm in asked else weights  # arms with the same weights differ where prompts have the anchor
        differences = mapping(self.metrics, "benchmarks", "differences", f"{own} - base")
        tasks = mapping(self.metrics, "benchmarks", "settings", "tasks")
        own_rows, base_rows = (read_questions(self.folder, each, tasks) for each in (own, "base"))
        for name, entry in mapping(asked, own).items():
            add(BENCHMARK + name, entry, get(differences, name))
            keep(BENCHMARK + name, own_rows.get(name), base_rows.get(name))
        return found


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _number(entry: object) -> Number | None:
    value, ci = get(entry, "value"), get(entry, "ci")
    if not is_number(value):
        return None
    if not has_interval(ci):
        return Number(float(value), 0.0)
    return Number(float(value), (ci[1] - ci[0]) / (2 * Z), (float(ci[0]), float(ci[1])))
