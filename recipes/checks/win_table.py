"""TELL with n rows against its controls with n and 2n rows, from the scores of single test rows: scores, losses, gaps.

    python recipes/checks/win_table.py docs/results/win/scores.jsonl.gz

Each line of the file is one arm of one cell: model, task, rows, seed, arm, the settings that differ from today's
defaults, the first half of each test row's hash, and its scores. Differences are paired by test row; the interval is
the 95 % percentile bootstrap over test rows, which are resampled together for all seeds, and the mean over tasks
resamples each task by itself. Where the answer is lists alone (WNUT17) the score is item F1, from counts of right,
given and wanted items.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

SAMPLES = 2000
SCORE = {
    "support": "field_accuracy",
    "clinc30": "accuracy",
    "nlupp": "field_accuracy",
    "wnut17": "items",
    "halu": "exact_match",
}
TWICE = {15: 30, 30: 60, 60: 115, 115: 230}
PAIRS = (
    ("tell, n", "sft-matched, 2n"),
    ("tell, n", "sft-readout, 2n"),
    ("tell, n", "sft-matched, n"),
    ("tell, n", "sft-readout, n"),
    ("tell, n", "icl-readout, n"),
    ("tell-free, n", "sft-matched, n"),
    ("tell-pseudo, n", "tell, n"),
    ("tell-pseudo, n", "sft-matched, 2n"),
    ("tell-pseudo, n", "sft-pseudo, n"),
    ("tell-pseudo-free, n", "sft-pseudo-free, n"),
    ("sft-pseudo, n", "sft-readout, n"),
)

Key = tuple[str, str, int, str]  # model, task, rows, arm


def share(stats: np.ndarray) -> np.ndarray:
    """Mean of (..., rows) scores; F1 of (..., 3) sums of counts is `f1`."""
    return np.asarray(stats.mean(axis=-1))


def f1(sums: np.ndarray) -> np.ndarray:
    return np.asarray(2 * sums[..., 0] / np.maximum(1, sums[..., 1] + sums[..., 2]))


def item_f1(rows: np.ndarray) -> np.ndarray:
    """Of (..., rows, 3) counts."""
    return f1(rows.sum(axis=-2))


def read(path: Path) -> dict[Key, dict[int, np.ndarray]]:
    """Scores by model, task, rows and arm, then by seed: (rows,), or (rows, 3) counts; rows in the order of hashes."""
    found: dict[Key, dict[int, np.ndarray]] = defaultdict(dict)
    with gzip.open(path, "rt") as lines:
        for line in lines:
            one = json.loads(line)
            if one["settings"]:
                continue
            values = one["items"] if SCORE[one["task"]] == "items" else one["scores"][SCORE[one["task"]]]
            scores = np.array([np.nan if v is None else v for v in values], dtype=float)
            found[one["model"], one["task"], one["rows"], one["arm"]][one["seed"]] = scores
    return found


def show_scores(path: Path) -> None:
    """The mean score of each arm over its seeds with its interval, and the mean losses of what it was tuned to.

    Losses are over all tasks and sizes, and over the four tasks of the README at each size.
    """
    rng = np.random.default_rng(0)
    for (model, task, rows, arm), seeds in read(path).items():
        values, draws = [], []
        for scores in seeds.values():
            value = item_f1 if scores.ndim == 2 else share
            values.append(float(value(scores)))
            draws.append(value(scores[rng.integers(0, len(scores), (SAMPLES, len(scores)))]))
        low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
        score = f"{100 * np.mean(values):.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        print(f"{model}, {task}, {rows} rows, {arm}: {score} ({len(values)} seeds)")
    losses: dict[tuple[str, str, str, str], list[tuple[float, float]]] = defaultdict(list)
    with gzip.open(path, "rt") as lines:
        for one in map(json.loads, lines):
            for name, loss in ({} if one["settings"] else one["loss"]).items():
                pair = (loss, one["untuned loss"][name])
                losses[one["model"], one["arm"], name, "all"].append(pair)
                if one["task"] != "halu":
                    losses[one["model"], one["arm"], name, f"{one['rows']} rows, without Halu"].append(pair)
    for (model, arm, name, which), pairs in losses.items():
        (tuned, untuned), worst = np.mean(pairs, axis=0), max(tuned - untuned for tuned, untuned in pairs)
        means = f"loss {tuned:.3f}, untuned {untuned:.3f}, at most {worst:+.3f} above it"
        print(f"{model}, {arm}, {name}, {which}: {means} ({len(pairs)} cells)")


def draws_of(a: dict[int, np.ndarray], b: dict[int, np.ndarray], rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Mean difference over the seeds that both have, and its resamples. Test rows differ between seeds."""
    gaps, resampled = [], []
    for seed in sorted(set(a) & set(b)):
        left, right = a[seed], b[seed]
        picks = rng.integers(0, len(left), (SAMPLES, len(left)))
        value = item_f1 if left.ndim == 2 else share
        gaps.append(float(value(left)) - float(value(right)))
        resampled.append(value(left[picks]) - value(right[picks]))
    return float(np.mean(gaps)), np.mean(resampled, axis=0)


def shown(gap: float, draws: np.ndarray) -> str:
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{100 * gap:+6.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def main(path: Path) -> None:
    show_scores(path)
    found, rng = read(path), np.random.default_rng(0)
    for model in dict.fromkeys(key[0] for key in found):
        print(f"\n{model}")
        for first, second in PAIRS:
            (a, _), (b, more) = first.split(", "), second.split(", ")
            together: dict[int, list[tuple[str, float, np.ndarray]]] = defaultdict(list)
            for of, task, rows, arm in found:
                other = found.get((model, task, TWICE.get(rows, 0) if more == "2n" else rows, b))
                if of == model and arm == a and other and set(other) & set(found[of, task, rows, arm]):
                    together[rows].append((task, *draws_of(found[of, task, rows, arm], other, rng)))
            for rows, parts in sorted(together.items()):
                mean = shown(float(np.mean([gap for _, gap, _ in parts])), np.mean([d for _, _, d in parts], axis=0))
                each = "; ".join(f"{task} {shown(gap, draws)}" for task, gap, draws in parts)
                print(f"{first} - {second}, n = {rows}: mean {mean} ({each})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
