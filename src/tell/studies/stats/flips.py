"""Flips: the amount at which each test row turns right, to test the paper's account by quanta (A.3).

If a skill consists of quanta that are learned one after the other (Michaud et al. 2023, arXiv 2303.13506), a test row
that needs one of them turns from wrong to right at its amount and stays right. If instead all rows become likelier to
be answered well together, rows that are right at one amount are often wrong at the next. Two numbers distinguish these,
each against shuffling which rows are right at every amount (which keeps the curve and loses the identity of rows):

- flips back: right at one amount, wrong at the next larger one;
- agreement: whether a row that turns right between two amounts does so at the same one under another seed.

Rows of unequal difficulty also flip back more rarely than by chance, so few flips back agree with quanta and do not
prove them. After the largest amount nothing was measured: every row that is wrong before it and right there counts as
turned for good.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tell.score.intervals import estimate_from, percentiles
from tell.studies.labels import key_name, value_name
from tell.studies.stats.curves import Curve

SHUFFLES = 1000
LEAST = 3  # amounts


def flips(curve: Curve, metric: str, x: str) -> dict[str, Any] | None:
    """The amounts at which the rows of each seed turn right for good.

    Args:
        metric: one that is 0 or 1 in every row; means of such values count as right from a half on.
        x: the key of the curve, for the verdict.

    Returns:
        ``{"amounts", "seeds": {seed: {...}}, "share": [...], "entropy", "even_entropy", "back", "agreement", "rows":
        {seed: {hash: amount or None}}, "verdict"}``; None where the metric is not binary, the key is no number, or no
        seed has three amounts.

        ``share`` is the share of rows that turn right for good at each amount, ``share_by_chance`` the same if rows
        were shuffled, ``never`` the share that is wrong at the largest; ``entropy`` is that of the shares between
        amounts above 0, in bits, ``entropy_by_chance`` that of the shuffled ones, and ``even_entropy`` that of a
        straight line in the logarithm: less means that they turn closer together. ``back`` is the number of flips
        back, with what shuffling gives, mean over seeds: ``p`` is how often shuffling gives as few, ``p_at_none`` how
        often it gives none; where that is likely, nothing can be concluded.
    """
    if not curve.numeric or not all(d.binary for d in curve.draws):
        return None
    seeds = sorted({seed for d in curve.draws for seed in d.by_seed})
    tables = {seed: found for seed in seeds if (found := _right(curve, metric, seed)) is not None}
    if not tables:
        return None
    rng = np.random.default_rng(0)
    amounts = next(iter(tables.values()))[0]
    result: dict[str, Any] = {"amounts": amounts, "seeds": {}, "rows": {}}
    turned, by_chance, backs, chances = [], [], [], []
    for seed, (own, hashes, right) in tables.items():
        at, shuffled = turning(right), [rng.permuted(right, axis=0) for _ in range(SHUFFLES)]
        if own == amounts:  # the shares leave out seeds with amounts missing
            turned.append(at)
            by_chance.append(np.concatenate([turning(each) for each in shuffled]))
        back, chance = flips_back(right), np.array([flips_back(each) for each in shuffled])
        backs.append(back)
        chances.append(chance)
        result["seeds"][str(seed)] = {
            "rows": len(hashes),
            "turn_at": {value_name(v): int((at == i).sum()) for i, v in enumerate(own)},
            "never": int((at == len(own)).sum()),
            "back": int(back),
            "back_by_chance": estimate_from(chance.mean(), *percentiles(chance), len(hashes)),
        }
        result["rows"][str(seed)] = {
            h: own[i] if i < len(own) else None for h, i in zip(hashes.tolist(), at.tolist(), strict=True)
        }
    every = np.concatenate(turned)  # at least those of the first seed
    share, chance_share = (_shares(each, len(amounts)) for each in (every, np.concatenate(by_chance)))
    result["share"], result["never"] = [round(float(v), 6) for v in share[:-1]], round(float(share[-1]), 6)
    result["share_by_chance"] = [round(float(v), 6) for v in chance_share[:-1]]
    first = next((i for i, v in enumerate(amounts) if v > 0), 0)
    result["entropy"] = _entropy(share[first + 1 : -1])
    result["entropy_by_chance"] = _entropy(chance_share[first + 1 : -1])
    result["even_entropy"] = _entropy(np.diff(np.log10(amounts[first:])))
    chance = np.mean(chances, axis=0)
    observed = float(np.mean(backs))
    result["back"] = {
        "value": round(observed, 4),
        "by_chance": estimate_from(chance.mean(), *percentiles(chance), len(every)),
        "p": _p(chance <= observed),
        "p_at_none": _p(chance <= 0),
    }
    result["agreement"] = _agreement(tables, rng)
    return {**result, "verdict": _verdict(result, x)}


def turning(right: np.ndarray) -> np.ndarray:
    """(n,) index of the amount from which each row stays right; m where it is wrong at the last.

    Args:
        right: (n, m) bool, rows by ascending amounts.
    """
    wrong = ~right[:, ::-1]
    last_wrong = np.where(wrong.any(axis=1), wrong.argmax(axis=1), right.shape[1])
    return right.shape[1] - last_wrong


def flips_back(right: np.ndarray) -> int:
    """Times that a row is right at one amount and wrong at the next; ``right`` as for `turning`."""
    return int((right[:, :-1] & ~right[:, 1:]).sum())


def _right(curve: Curve, metric: str, seed: int) -> tuple[list[Any], np.ndarray, np.ndarray] | None:
    """Amounts of one seed, its rows by hash, and (rows, amounts) whether each is right; rows that all amounts have."""
    runs = [(v, o.measured) for v, group in zip(curve.x, curve.groups, strict=True) for o in group if o.seed == seed]
    runs = [(v, run) for v, run in runs if metric in run.metrics]
    if len(runs) < LEAST:
        return None
    tables = []
    for _, run in runs:
        sums: dict[str, list[float]] = {}
        for key, value in zip(run.hashes.tolist(), run.metrics[metric].per_row.tolist(), strict=True):
            if np.isfinite(value):
                sums.setdefault(key, []).append(value)
        tables.append({key: sum(v) / len(v) >= 0.5 for key, v in sums.items()})  # equal test rows are one row
    hashes = sorted(set.intersection(*(set(table) for table in tables)))
    if not hashes:
        return None
    right = np.array([[table[key] for table in tables] for key in hashes])
    return [v for v, _ in runs], np.array(hashes), right


def _shares(at: np.ndarray, amounts: int) -> np.ndarray:
    """(amounts + 1,) of rows that turn at each amount, and never."""
    return np.bincount(at, minlength=amounts + 1) / len(at)


def _p(extreme: np.ndarray) -> float:
    """p of a permutation test, from which shuffles are as extreme; the data count as one of them."""
    return round(float((1 + extreme.sum()) / (1 + len(extreme))), 4)


def _entropy(weights: np.ndarray) -> float | None:
    """Bits; None where there is no weight."""
    total = weights.sum()
    if total <= 0:
        return None
    p = weights[weights > 0] / total
    return round(float(-(p * np.log2(p)).sum()) + 0.0, 4)


def _agreement(tables: dict[int, tuple[list[Any], np.ndarray, np.ndarray]], rng: np.random.Generator) -> dict | None:
    """Share of rows that turn right at the same amount, mean over pairs of seeds, against pairing rows at random.

    Only rows that turn between two amounts under both seeds count: those that are right from the start or never say
    nothing about amounts. None below 10 such rows.
    """
    same, chance = [], []
    seeds = list(tables)
    for i, a in enumerate(seeds):
        for b in seeds[i + 1 :]:
            _, left, right = np.intersect1d(tables[a][1], tables[b][1], return_indices=True)
            one, two = turning(tables[a][2])[left], turning(tables[b][2])[right]
            turns = (np.minimum(one, two) > 0) & (np.maximum(one, two) < len(tables[a][0]))
            one, two = one[turns], two[turns]
            if len(one) < 10 or tables[a][0] != tables[b][0]:
                continue
            same.append(float((one == two).mean()))
            chance.append([float((one == rng.permutation(two)).mean()) for _ in range(SHUFFLES)])
    if not same:
        return None
    random = np.mean(chance, axis=0)
    return {
        "value": round(float(np.mean(same)), 4),
        "by_chance": estimate_from(random.mean(), *percentiles(random), len(same)),
        "p": _p(random >= np.mean(same)),
    }


def _verdict(result: dict[str, Any], x: str) -> str:
    """Sentences on what the numbers show and do not show."""
    amounts, share = result["amounts"], result["share"]
    what, back = key_name(x), result["back"]
    most = int(np.argmax(share[1:])) + 1
    turned, shuffled = sum(share[1:]), result["share_by_chance"]
    parts = []
    if turned > 0:
        last = ", after which nothing was measured" if most == len(share) - 1 else ""
        chance = 100 * shuffled[most] / sum(shuffled[1:]) if sum(shuffled[1:]) else 0.0
        parts.append(
            f"{100 * turned:.0f} % of the test rows turn right after the smallest amount and stay so to the largest, "
            f"{100 * share[most] / turned:.0f} % of these at {value_name(amounts[most])} {what}{last} "
            f"({chance:.0f} % if rows were shuffled)"
        )
    else:
        parts.append("No test row turns right for good after the smallest amount")
    by_chance = back["by_chance"]
    low, high = by_chance["ci"]
    shuffles = f"{by_chance['value']:.1f} ({low:.1f} to {high:.1f}) if rows were shuffled"
    counts = f"{back['value']:.1f} flips back a seed, {shuffles}"
    if back["p_at_none"] >= 0.025:
        parts.append(f"Too few rows change for flips back to be informative ({counts})")
    elif back["p"] < 0.025:
        parts.append(
            f"Rows that are right tend to stay right ({counts}), as quanta would have it, and as rows of unequal "
            "difficulty would too"
        )
    elif back["p"] < 0.25:
        parts.append(f"Fewer flips back than by chance, but not surely so ({counts}): quanta are left open")
    else:
        parts.append(
            f"Which rows are right is not remembered from one amount to the next ({counts}): this speaks against quanta"
        )
    agreement = result["agreement"]
    if agreement is not None:
        by_chance = agreement["by_chance"]["value"]
        words = "more often than by chance" if agreement["p"] < 0.025 else "no more often than by chance"
        parts.append(
            f"Under another seed a row that turns does so at the same amount in {100 * agreement['value']:.0f} % of "
            f"cases, {words} ({100 * by_chance:.0f} %)"
        )
    return ". ".join(parts) + "."
