"""How far a metric ranks translations as people do: the measures of the WMT metrics tasks, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from tell.errors import TellError
from tell.score.scored import Metric

GAP = 25.0  # points of 100; a smaller difference between two raw scores is no judgement (WMT17 and since)


def correlations(
    metrics: Sequence[Metric],
    raw: np.ndarray,
    standardised: np.ndarray,
    *,
    gap: float = GAP,
    seed: int = 42,
    samples: int = 1000,
) -> dict[str, dict]:
    """Agreement of a metric with direct assessments of the same outputs.

    Args:
        metrics: of s systems, each over the same u units (segments, or documents).
        raw: (u, s) human scores from 0 to 100; NaN where an output was not judged.
        standardised: (u, s) the same scores, standardised by rater.
        gap: points of `raw` that two outputs of a unit must differ by to be a pair.
        seed, samples: of the bootstrap over units; each resample takes the same units of all systems.

    Returns:
        ``{"value", "ci": [low, high], "n"}`` by name:

        - ``kendall_like``: (concordant - discordant) / all, over pairs of outputs of a unit that people set apart by
          `gap`; a tie of the metric is discordant (Ma et al., WMT19). n pairs.
        - ``pearson``: of the metric and `standardised`, over judged outputs. n outputs.
        - ``system_pearson``: of the corpus scores and the systems' mean `standardised`. n systems.
        - ``pairwise_accuracy``: share of pairs of systems that both put in the same order (Kocmi et al., WMT21).
          n pairs.

    Raises:
        TellError: the shapes do not match, or there are fewer than two systems or units.
    """
    scores = np.stack([metric.per_row for metric in metrics], axis=1) if metrics else np.empty((0, 0))
    if scores.shape != raw.shape or raw.shape != standardised.shape or min(scores.shape) < 2:
        raise TellError(
            f"scores of shape {scores.shape} and judgements of shapes {raw.shape} and {standardised.shape}",
            where="correlations",
            remedy="Give at least two systems and two units, and a judgement or NaN for each output.",
        )
    units, systems = raw.shape
    drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=samples)
    weights = np.concatenate([np.ones((1, units)), drawn])  # the sample itself, then its resamples
    pairs, moments = _pair_counts(scores, raw, gap), _moments(scores, standardised)
    concordant, discordant = np.moveaxis(weights @ pairs, -1, 0)
    corpus = np.stack([metric.combine(weights @ metric.stats) for metric in metrics], axis=1)
    judged = np.isfinite(standardised)
    with np.errstate(invalid="ignore", divide="ignore"):
        people = (weights @ np.where(judged, standardised, 0.0)) / (weights @ judged)
        found = {
            "kendall_like": ((concordant - discordant) / (concordant + discordant), int(pairs.sum())),
            "pearson": (_pearson(weights @ moments), int(judged.sum())),
            "system_pearson": (_rows_pearson(corpus, people), systems),
            "pairwise_accuracy": (_accuracy(corpus, people), systems * (systems - 1) // 2),
        }
        return {name: _estimate(values, n) for name, (values, n) in found.items()}


def _pair_counts(scores: np.ndarray, raw: np.ndarray, gap: float) -> np.ndarray:
    """(u, 2): concordant and discordant pairs of each unit."""
    counts = np.zeros((len(raw), 2))
    for a, b in combinations(range(raw.shape[1]), 2):
        people, metric = raw[:, a] - raw[:, b], scores[:, a] - scores[:, b]
        apart = (np.abs(people) >= gap) & (people != 0)  # NaN is not
        agree = np.sign(people) == np.sign(metric)
        counts += np.stack([apart & agree, apart & ~agree], axis=1)
    return counts


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(u, 6): count and sums of x, y, xx, yy, xy of each unit's judged outputs."""
    judged = np.isfinite(y)
    x = np.where(judged, x - x[judged].mean(), 0.0)  # centred, or squares would lose digits
    y = np.where(judged, y - y[judged].mean(), 0.0)
    return np.stack([part.sum(axis=1) for part in (judged, x, y, x * x, y * y, x * y)], axis=1)


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))


def _rows_pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(b,) from (b, s) each."""
    x, y = (part - part.mean(axis=1, keepdims=True) for part in (x, y))
    return (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))


def _accuracy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    pairs = list(combinations(range(x.shape[1]), 2))
    return np.mean([np.sign(x[:, a] - x[:, b]) == np.sign(y[:, a] - y[:, b]) for a, b in pairs], axis=0)


def _estimate(values: np.ndarray, n: int) -> dict:
    """The sample's value and the percentiles of its resamples; None where there is nothing to correlate."""
    resamples = values[1:][np.isfinite(values[1:])]
    ends = np.percentile(resamples, (2.5, 97.5)) if len(resamples) else (np.nan, np.nan)
    value, low, high = (round(float(v), 6) if np.isfinite(v) else None for v in (values[0], *ends))
    return {"value": value, "ci": [low, high], "n": n}
