"""The cost of a study before weights are loaded: steps, tokens, FLOPs and hours of each cell. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tell.config import Config
from tell.data.general import GeneralSource
from tell.errors import TellError
from tell.models.predict import predict_seconds
from tell.progress import Display
from tell.run.costs import likely_place
from tell.run.general_rows import General, load_general, source_of
from tell.run.plan import describe_plan, unwritten_general
from tell.run.prepare import prepare
from tell.run.task import Notices, Task, load_task, placed_anchor
from tell.studies.cells import Cell, identity
from tell.studies.run_cell import InnerDisplay
from tell.studies.separation_cells import TOKENS
from tell.studies.study_folder import Root

T = TypeVar("T")
NOTHING: dict[str, Any] = dict.fromkeys(("steps", "tokens", "flops", "training_seconds", "evaluation_seconds"), 0)
NOTHING |= {"basis": "", "error": None}


class Planner:
    """Plans cells one after the other; data that several share is read and tokenised once."""

    def __init__(self, root: Root, display: Display) -> None:
        self.display = display
        self.made: dict[str, Any] = {}
        self.measured = measured_evaluation(root)

    def cost(self, cell: Cell) -> dict[str, Any]:
        """Steps, tokens, FLOPs, and seconds of training and of everything else; or the error the run would end in.

        Returns:
            ``{"steps", "tokens", "flops", "training_seconds", "evaluation_seconds", "basis", "error"}``.
        """
        try:
            if cell.separate is not None:
                return self._separation(cell, int(cell.separate["queries"]))
            plan = self._plan(cell.config)
        except Exception as error:  # the other cells can still be planned
            known = isinstance(error, TellError)
            return {**NOTHING, "error": str(error) if known else f"{type(error).__name__}: {error}"}
        arms, predicted = plan["arms"].values(), plan["predicted"]
        found = self.measured.get(evaluation_key(cell))
        left_out = ", benchmarks not counted" if cell.config.eval.benchmarks else ""
        return {
            **{key: sum(arm[key] for arm in arms) for key in ("steps", "tokens", "flops")},
            "training_seconds": predicted["writing_seconds"] + predicted["training_seconds"],
            "evaluation_seconds": found or predicted["answering_seconds"] + predicted["measuring_seconds"],
            "basis": predicted["basis"] + (", evaluation measured" if found else left_out),
            "error": None,
        }

    def _separation(self, cell: Cell, queries: int) -> dict[str, Any]:
        """Four groups of queries pass the model once: a third of what training on them takes."""
        files = self._task(cell.config).files
        found = self.measured.get(evaluation_key(cell))
        tokens, place = 4 * queries * TOKENS, likely_place(cell.config)
        time = predict_seconds(files.architecture, tokens, fingerprint=files.fingerprint, place=place)
        basis = time.basis + (", evaluation measured" if found else "")
        return {**NOTHING, "evaluation_seconds": found or time.seconds / 3, "basis": basis}

    def _plan(self, config: Config) -> dict[str, Any]:
        """`tell.plan`, with its parts kept."""
        task = self._task(config)
        source = source_of(task)
        general = self._general(task, source) if source.read is not None else unwritten_general
        return describe_plan(prepare(task, placed_anchor(task), general))

    def _task(self, config: Config) -> Task:
        """A separate task for a cell, from the rows that cells with the same data share."""
        parts = [config.task.model_copy(update={"rows": None, "tokens": None}), config.model, config.tokens]
        key = _key("task", *parts, config.seed, config.train.max_length)
        kept = self._once(key, lambda: load_task(config, self.display))
        train = config.train.model_copy(update={"max_length": kept.config.train.max_length})
        notices = Notices(self.display, list(kept.notices.texts))
        return replace(kept, config=config.model_copy(update={"train": train}), notices=notices)

    def _general(self, task: Task, source: GeneralSource) -> General:
        config = task.config
        rules = [config.train.max_length, config.train.loss_on, config.eval.forgetting_rows, config.seed]
        where = [source.name, config.general.columns, config.model, config.tokens]
        dropped = config.task if config.task.drop_overlap else None  # only then the task decides which rows there are
        key = _key("general", *where, *rules, dropped)
        return self._once(key, lambda: load_general(task, source, overlap=config.task.drop_overlap))

    def _once(self, key: str, make: Callable[[], T]) -> T:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def plan_cells(root: Root, cells: Sequence[Cell], display: Display) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell with its costs, as from `Planner.cost`."""
    with display.bar("plan", len(cells), "cells") as advance:
        planner = Planner(root, InnerDisplay(advance, "plan"))
        for cell in cells:
            yield cell, planner.cost(cell)
            advance(1)


def plan_table(
    root: Root,
    cells: Sequence[Cell],
    states: Mapping[str, Mapping[str, Any]],
    points: Mapping[str, Mapping[str, Any]],
    display: Display,
) -> dict[str, Any]:
    """All cells with their costs, and totals of all and of those left to do.

    Args:
        states: of each cell, as in study.json.
        points: the values that the rows of each cell have in common.

    Returns:
        ``{"cells": [{"cell", "arm", "point", "seed", "state", "steps", ...}], "total": {...}, "left": {...}}``; totals
        have ``cells, steps, tokens, flops, seconds``; ``unplanned`` counts the cells that cannot be planned and add
        nothing, ``errors`` says why.
    """
    rows = []
    for cell, cost in plan_cells(root, cells, display):
        about = {"cell": cell.name, "arm": cell.arm, "point": points[cell.name], "seed": cell.config.seed}
        rows.append({**about, "state": states[cell.name]["state"], **cost, "seconds": seconds_of(cost)})
    left = [row for row in rows if row["state"] not in ("done", "failed")]
    return {"cells": rows, "total": _sum(rows), "left": _sum(left)}


def seconds_of(cost: Mapping[str, Any]) -> float:
    """The predicted seconds of a cell in all."""
    return float(cost["training_seconds"] + cost["evaluation_seconds"])


def evaluation_key(cell: Cell) -> str:
    """Equal for cells whose evaluation is the same work."""
    known = identity(cell.config)
    parts = {key: known.get(key) for key in ("model", "generate", "eval")}
    task = {key: known.get("task", {}).get(key) for key in ("data", "test", "test_rows")}
    return _key(cell.arm, parts, task, *([cell.separate] if cell.separate is not None else []))


def measured_evaluation(root: Root) -> dict[str, float]:
    """Mean seconds other than training, by `evaluation_key`, of the finished cells of all studies of a root.

    Only of cells that ran in one session: the time of a killed session since its last stage is not recorded.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for path in sorted(root.cells.glob("*.json")):
        record = root.record(path.stem)
        seconds, training, key = (record.get(name) for name in ("seconds", "training_seconds", "evaluation"))
        if record.get("state") == "done" and record.get("attempts") == 1 and None not in (seconds, training, key):
            found[str(key)].append(float(seconds or 0) - float(training or 0))
    return {key: sum(values) / len(values) for key, values in found.items()}


def _sum(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = [row["error"] for row in rows if row["error"] is not None]
    counts = {"cells": len(rows), "unplanned": len(errors), "errors": list(dict.fromkeys(errors))}
    return counts | {key: sum(row[key] for row in rows) for key in ("steps", "tokens", "flops", "seconds")}


def _key(*parts: object) -> str:
    text = json.dumps([p.model_dump(mode="json") if hasattr(p, "model_dump") else p for p in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
