"""What each change of training brings, from the scores of single test rows: `recipes/small/ablate.yaml`.

    python recipes/checks/ablate_table.py docs/results/win/scores.jsonl.gz

For each change and task the score, free and with closed fields decided, and the mean over tasks of the paired gap
from the run without it, with the 95 % percentile bootstrap interval over test rows. Below, each change with 60 rows
against plain SFT with 115, free, over the tasks that have both.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from win_table import SAMPLES, SCORE, item_f1, share, shown

TASKS = ("nlupp", "wnut17", "support", "clinc30")
ARMS = {"free": ("tell-free", "sft-matched", "tell-pseudo-free"), "decided": ("tell", "sft-readout", "tell-pseudo")}


def read(path: Path, rows: int = 60) -> dict[tuple[str, str], dict[str, dict]]:
    """Entries of SmolLM2-135M with seed 42, by (how it is trained, how it answers), then by task."""
    found: dict[tuple[str, str], dict[str, dict]] = defaultdict(dict)
    with gzip.open(path, "rt") as lines:
        for line in lines:
            one = json.loads(line)
            if (one["model"], one["rows"], one["seed"]) != ("smollm2-135m", rows, 42) or one["task"] not in TASKS:
                continue
            for how, arms in ARMS.items():
                if one["arm"] in arms:
                    trained = "sft" if one["arm"].startswith("sft") else "tell"
                    what = dict(one["settings"])
                    if trained == "tell" and what.setdefault("train.learning_rate", 2e-3) == 1e-3:
                        del what["train.learning_rate"]  # of the ablation, whose defaults were those of its day
                    text = ", ".join(f"{key.split('.')[1]} {value}" for key, value in what.items())
                    text = ", ".join(filter(None, ["pseudo-labelled rows" if "pseudo" in one["arm"] else "", text]))
                    found[f"{trained}: {text}".removesuffix(": "), how][one["task"]] = one
    return found


def scores(one: dict) -> np.ndarray:
    values = one["items"] if SCORE[one["task"]] == "items" else one["scores"][SCORE[one["task"]]]
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def against_more(path: Path) -> None:
    """What 60 rows reach against SFT of as many steps with 115."""
    rng, more = np.random.default_rng(0), read(path, 115)["sft", "free"]
    for (name, how), tasks in sorted(read(path).items()):
        gaps, draws, each = [], [], []
        for task in (task for task in TASKS if task in tasks and task in more):
            here, other = scores(tasks[task]), scores(more[task])
            value = item_f1 if here.ndim == 2 else share
            picks = rng.integers(0, len(here), (SAMPLES, len(here)))
            gaps.append(float(value(here)) - float(value(other)))
            draws.append(value(here[picks]) - value(other[picks]))
            each.append(f"{task} {shown(gaps[-1], draws[-1])}")
        mean = shown(float(np.mean(gaps)), np.mean(draws, axis=0))
        print(f"{name:45s} {how:8s} 60 rows - SFT with 115: {mean} ({'; '.join(each)})")


def main(path: Path) -> None:
    found, rng = read(path), np.random.default_rng(0)
    for (name, how), tasks in sorted(found.items()):
        usual = found[name.split(":")[0], how]
        cells, gaps, draws = [], [], []
        for task in TASKS:
            if task not in tasks or task not in usual:
                cells.append(f"{task}     –")
                continue
            here, other = scores(tasks[task]), scores(usual[task])
            value = item_f1 if here.ndim == 2 else share
            cells.append(f"{task} {100 * float(value(here)):5.1f}")
            picks = rng.integers(0, len(here), (SAMPLES, len(here)))
            gaps.append(float(value(here)) - float(value(other)))
            draws.append(value(here[picks]) - value(other[picks]))
        loss = np.mean([one["loss"]["witness"] for one in tasks.values()])
        probe = np.mean([one["loss"]["probe"] for one in tasks.values()])
        change = "" if name in ("sft", "tell") else shown(float(np.mean(gaps)), np.mean(draws, axis=0))
        print(f"{name:45s} {how:8s} {'  '.join(cells)}  {change:24s} witness {loss:.3f} probe {probe:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    against_more(Path(sys.argv[1]))
