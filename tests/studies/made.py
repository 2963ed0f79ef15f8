"""Study folders written by hand: made-up scores in the files a real study leaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tell.run.answers import adapter_arm
from tell.score.means import mean_metric
from tell.studies.measured import Measured
from tell.studies.results import Outcome, Study
from tell.studies.stats.curves import Curve
from tell.studies.stats.seed_means import Bootstrap

POINTS = [{"task.rows": 15, "general.tokens": g} for g in (0, 10_000, 30_000, 100_000, 300_000, 1_000_000)]
ARMS = ("base", "sft", "tell")
SEEDS = (42, 43, 44)
DEPENDS = {"base": (), "sft": ("task.rows",)}  # keys that have an effect on an arm; all where it is not named


def entry(value: float, error: float = 0.03, n: int = 20) -> dict:
    return {"value": round(float(value), 6), "ci": [value - 1.96 * error, value + 1.96 * error], "n": n}


def make_study(
    root: Path,
    *,
    points: Sequence[dict] = POINTS,
    arms: Sequence[str] = ARMS,
    seeds: Sequence[int] = SEEDS,
    recipe: Mapping[str, Any] | None = None,
    chance: Callable[[str, dict, int], float] | None = None,
    rows: int = 20,
    states: Mapping[tuple[str, int], str] | None = None,
    loss: Callable[[str, dict], float] = lambda arm, point: 1.7,
) -> Path:
    """A study folder beside its cells.

    Args:
        chance: of a row to be right, by arm, point and seed; each row has a difficulty of its own.
        states: (arm, seed) to the state of its cells, where it is not done.
        loss: on the general probe.
    """
    chance = chance or (
        lambda arm, point, seed: {"base": 0.05, "sft": 0.2}.get(arm, 0.2 + 0.1 * np.log10(1 + point["general.tokens"]))
    )
    table, cells = [], {}
    for seed in seeds:
        for point in points:
            for arm in arms:
                own = {k: v for k, v in point.items() if k in DEPENDS.get(arm, point)}
                digest = hashlib.sha256(json.dumps([arm, own, seed]).encode()).hexdigest()[:16]
                name = f"{arm}-{digest}"
                table.append({"point": point, "arm": arm, "seed": seed, "cell": name})
                if name in cells:
                    continue
                state = (states or {}).get((arm, seed), "done")
                error = "out of memory <here>" if state == "failed" else None
                cells[name] = {"state": state, "error": error, "seconds": 3.0, "attempts": 1, "host": "here"}
                if state == "done":
                    write_cell(root / "cells" / name, arm, chance(arm, point, seed), seed, rows, loss(arm, point))
    folder = root / "made"
    folder.mkdir(parents=True, exist_ok=True)
    data = {"title": "Made <up>", "claim": "x < y", "created": "2026-11-22", "recipe": dict(recipe or {})}
    (folder / "study.json").write_text(json.dumps({**data, "rows": table, "cells": cells}), encoding="utf-8")
    return folder


def write_cell(folder: Path, arm: str, chance: float, seed: int, rows: int, loss: float) -> None:
    rng = np.random.default_rng([seed, rows])
    difficulty, luck = rng.uniform(size=(2, rows))
    right = (0.7 * difficulty + 0.3 * luck < chance).astype(float)
    nats = np.round(2.5 - chance + 0.3 * difficulty, 6)
    (folder / "predictions").mkdir(parents=True)
    lines = [
        {"hash": f"{seed:08x}{i:08x}", "scores": {"schema_adherence": right[i], "answer_loss": nats[i]}}
        for i in range(rows)
    ]
    (folder / f"predictions/{arm}.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    weights = adapter_arm(arm) or "base"
    change = {} if weights == "base" else {f"{weights} - base": {"probe": {"loss": entry(loss - 1.7, 0.01)}}}
    trained = {"steps": 12, "tokens": 3456, "flops": 2.5e13, "learning_rate": 1e-3, "seconds": 60.0}
    metrics = {
        "task": {"kind": "json", "primary": "schema_adherence"},
        "arms": {arm: {"schema_adherence": entry(right.mean(), n=rows), "answer_loss": entry(nats.mean(), n=rows)}},
        "forgetting": {
            "arms": {"base": {"probe": {"loss": entry(1.7, 0.1)}}, weights: {"probe": {"loss": entry(loss, 0.1)}}},
            "differences": change,
        },
        "train": {"arms": {} if weights == "base" else {weights: trained}},
        "eval": {"arms": {arm: {"flops": 1e13}}},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (folder / "plan.json").write_text(json.dumps({"model": {"parameters": 1000}}), encoding="utf-8")
    machine = {"device": "cpu", "dtype": "bf16" if seed else "fp32"}
    (folder / "findings.json").write_text(json.dumps({"machine": machine}), encoding="utf-8")


def outcome(
    right: Sequence[float],
    *,
    arm: str = "tell",
    seed: int = 42,
    point: dict | None = None,
    rows: str = "",
    alone: bool = False,
    **more: Any,
) -> Outcome:
    """One outcome over rows of 0 and 1; ``rows`` names the set of test rows, equal names being equal rows."""
    values = np.asarray(right, dtype=float)
    hashes = np.array([f"{rows or seed}-{i}" for i in range(len(values))])
    measured = Measured(hashes, {"m": mean_metric(values, binary=True)}, more, {}, alone)
    return Outcome(point or {}, arm, seed, f"{arm}-{seed}-{point}", measured)


def study_of(outcomes: Sequence[Outcome]) -> Study:
    keys = tuple(dict.fromkeys(k for o in outcomes for k in o.point))
    rows = [{"point": o.point, "arm": o.arm, "seed": o.seed, "cell": o.cell} for o in outcomes]
    return Study(Path(), Path(), "", "", {}, "", rows, list(outcomes), keys=keys)


def curve_of(
    table: Mapping[int, np.ndarray], x: Sequence[float], *, samples: int = 400, arm: str = "tell", rows: str = ""
) -> Curve:
    """The curve of seeds' (rows, amounts) tables of 0 and 1."""
    groups = [
        [outcome(right[:, i], arm=arm, seed=seed, point={"x": v}, rows=rows) for seed, right in table.items()]
        for i, v in enumerate(x)
    ]
    bootstrap = Bootstrap(study_of([o for group in groups for o in group]), samples)
    draws = [bootstrap.of(group, "m") for group in groups]
    return Curve(arm, {}, list(x), [d for d in draws if d], groups, False)
