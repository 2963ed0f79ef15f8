"""``python -m bench.readout TRAIN --test TEST``: how well the untuned model's states tell closed fields.

Trains nothing: for each number of task rows and each draw of them, the readout is fitted as in a run.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np

from tell.config import load_config
from tell.data.subset import take_rows
from tell.readout.readout import FieldReadout
from tell.run.readouts import fit_readout, prompt_states
from tell.run.session import Session
from tell.run.task import Task, load_task


def measure(task: Task, session: Session, sizes: list[int], draws: int) -> list[dict[str, Any]]:
    """A row per number of task rows and field: means over draws, on the test rows that have the field.

    ``right`` is the share of rows whose values are all right, ``f1`` of a list's items over all rows, ``constant`` the
    share that the most frequent training value gives.
    """
    states = prompt_states(session, task.test, "test rows")
    found: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    for size in sizes:
        for seed in range(draws):
            chosen = take_rows(len(task.train), size, seed)
            part = replace(task, train=[task.train[i] for i in chosen])
            readout = fit_readout(part, session)
            for field, scores in zip(readout.fields, readout.scores(states), strict=True):
                found[size, field.field.name].append(_numbers(field, scores, part, task))
    return [
        {"rows": size, "field": name, "draws": len(values)}
        | {key: round(float(np.mean([value[key] for value in values])), 4) for key in values[0]}
        for (size, name), values in found.items()
    ]


def _numbers(field: FieldReadout, scores: np.ndarray, part: Task, task: Task) -> dict[str, float]:
    targets = [field.field.target(example.answer) for example in task.test]
    has = [i for i, target in enumerate(targets) if target is not None]
    gold = np.array([targets[i] for i in has]) > 0
    own = [target for example in part.train if (target := field.field.target(example.answer)) is not None]
    held = field.holds(scores)[has]
    common = np.zeros(gold.shape[1], dtype=bool)
    if not field.field.is_set:
        common[np.sum(own, axis=0).argmax()] = True
    numbers = {
        "right": float((held == gold).all(axis=1).mean()),
        "constant": float((common == gold).all(axis=1).mean()),
        "left_out": field.accuracy,
        "used": float(field.informed),
    }
    if field.field.is_set:
        numbers["f1"] = float(2 * (held & gold).sum() / max(1, held.sum() + gold.sum()))
    return numbers


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.readout", description=__doc__)
    p.add_argument("data")
    p.add_argument("--test", required=True)
    p.add_argument("--schema")
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--rows", default="15,30,60", help="numbers of task rows")
    p.add_argument("--draws", type=int, default=5, help="of the task rows, seeds 0 and up")
    given = p.parse_args()
    task = {"data": given.data, "test": given.test, "schema": given.schema, "validation_fraction": 0.0}
    loaded = load_task(load_config(flags={"task": task, "model": {"name": given.model}, "anchor": {"text": "none"}}))
    session = Session(loaded.files, loaded.config, loaded.chat)
    sizes = [size for size in map(int, given.rows.split(",")) if size <= len(loaded.train)]
    for row in measure(loaded, session, sizes, given.draws):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
