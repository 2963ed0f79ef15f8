"""Distance between two groups of hidden states: linear probe, silhouette, MMD; and a t-SNE plot.

Needs the extra ``study``. Dimensions are standardised over the rows at hand: a few of a transformer's are hundreds of
times larger than the rest and would dominate distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tell.errors import TellError

FEWEST = 5  # rows of each group; with fewer none can be held out
FOLDS = 10
CONTRASTS = {  # the groups of queries that are compared
    "without anchor": ("task", "general"),
    "with anchor": ("task + anchor", "general"),
    "control": ("general + anchor", "general"),
}
PERMUTATIONS = 2000


@dataclass(frozen=True)
class Separation:
    """n rows of each of two groups, the first group's first.

    Attributes:
        hits: (2n,) 1 where the probe, trained without that row, names its group; chance is 0.5.
        silhouettes: (2n,) of each row (Rousseeuw 1987), -1 to 1, 0 where the groups overlap.
        silhouettes_without: (2n,) their mean with each row left out, for the jackknife (a row is in all distances).
        mmd2: squared maximum mean discrepancy, unbiased (Gretton et al. 2012, JMLR 13, eq. 3), so it may be below 0.
        mmd2_ci: 95 % by the jackknife over rows; uninformative where the groups are equal; use ``p`` there.
        p: share of relabellings of the rows with an MMD as large; at least 1 / (permutations + 1).
    """

    hits: np.ndarray
    silhouettes: np.ndarray
    silhouettes_without: np.ndarray
    mmd2: float
    mmd2_ci: tuple[float, float]
    p: float


def separate_states(a: np.ndarray, b: np.ndarray, *, seed: int, permutations: int = PERMUTATIONS) -> Separation:
    """Probe, silhouette and MMD of two groups of states, each (n, width).

    Args:
        seed: of folds and relabellings.

    Raises:
        TellError: groups of different size, or fewer than `FEWEST` rows; scikit-learn is missing.
    """
    metrics = _sklearn("metrics")
    n = len(a)
    if n != len(b) or n < FEWEST:
        raise TellError(
            f"{n} rows against {len(b)}", where="separation", remedy=f"Use two groups of one size, at least {FEWEST}."
        )
    states, group = _standardised(np.concatenate([a, b])), np.repeat([1, 0], n)
    states = _rotated(states)
    squared = metrics.pairwise.euclidean_distances(states, squared=True)
    np.fill_diagonal(squared, 0.0)
    if squared.any():
        silhouettes = metrics.silhouette_samples(np.sqrt(squared), group, metric="precomputed")
        without = _without_each(np.sqrt(squared), group)
    else:  # one point: the embedding of a template's last token, the same in every row
        silhouettes = without = np.zeros(2 * n)
    mmd2, interval, p = _mmd(squared, n, seed, permutations)
    return Separation(_probe(states, group, seed), silhouettes, without, mmd2, interval, p)


def _without_each(distances: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(2n,) mean silhouette of the other rows, each row left out in turn, from (2n, 2n) distances."""
    own = group[:, None] == group  # (2n, 2n) rows of the same group
    left = np.ones(len(group)) - np.eye(len(group))  # [k, j]: row j is there when k is left out
    # [k, i]: sums of row i's distances to its own and the other group, and how many rows these have, without row k
    sums = [left @ (distances * mask).T for mask in (own, ~own)]
    counts = [left @ mask.T - (1 if mask is own else 0) for mask in (own, ~own)]
    near, far = (total / np.maximum(count, 1) for total, count in zip(sums, counts, strict=True))
    scores = (far - near) / np.maximum(np.maximum(far, near), 1e-300)
    return (scores * left).sum(axis=1) / left.sum(axis=1)


def jackknife_error(without: np.ndarray) -> float:
    """Standard error of a statistic of two groups from (2n,) its values with each row left out, first group first."""
    n = len(without) // 2
    return float(np.sqrt((n - 1) * (without[:n].var() + without[n:].var())))


def length_hits(a: np.ndarray, b: np.ndarray, *, seed: int) -> np.ndarray:
    """(2n,) hits of the same probe on each row's number of tokens alone: its logarithm and that squared."""
    tokens = np.log(np.concatenate([a, b]).astype(np.float64))
    features = _standardised(np.stack([tokens, tokens**2], axis=1))
    return _probe(features, np.repeat([1, 0], len(a)), seed)


def tsne(a: np.ndarray, b: np.ndarray, *, seed: int) -> np.ndarray:
    """(2n, 2) t-SNE coordinates of the rows (van der Maaten and Hinton 2008), for plotting only."""
    manifold = _sklearn("manifold")
    states = _rotated(_standardised(np.concatenate([a, b])))
    perplexity = min(30.0, (len(states) - 1) / 3)
    return manifold.TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(states)


def _standardised(states: np.ndarray) -> np.ndarray:
    """Each column to mean 0 and variance 1; a constant one to 0."""
    states = states.astype(np.float64)
    centred = states - states.mean(axis=0)
    scale = centred.std(axis=0)
    tiny = scale <= 1e-9 * np.abs(states).max(initial=0.0)
    return np.where(tiny, 0.0, centred / np.where(tiny, 1.0, scale))


def _rotated(states: np.ndarray) -> np.ndarray:
    """The rows in at most as many dimensions as there are rows; distances and the probe do not change."""
    left, sizes, _ = np.linalg.svd(states, full_matrices=False)
    return left * sizes


def _probe(states: np.ndarray, group: np.ndarray, seed: int) -> np.ndarray:
    """(rows,) 1 where logistic regression (ridge penalty, C = 1), trained on the other folds, is right."""
    linear, selection = _sklearn("linear_model"), _sklearn("model_selection")
    probe = linear.LogisticRegression(max_iter=2000)
    rng, n = np.random.default_rng(seed), len(group) // 2
    # Balanced folds: otherwise the majority group in training is the wrong guess on the held-out fold.
    fold = np.concatenate([rng.permutation(n) % min(FOLDS, n) for _ in range(2)])
    guesses = selection.cross_val_predict(probe, states, group, cv=selection.PredefinedSplit(fold))
    return (guesses == group).astype(np.float64)


def _mmd(squared: np.ndarray, n: int, seed: int, permutations: int) -> tuple[float, tuple[float, float], float]:
    """MMD^2, its interval and p from (2n, 2n) squared distances; Gaussian kernel as wide as the median distance."""
    width = float(np.median(np.sqrt(squared[np.triu_indices(2 * n, 1)])))
    kernel = np.exp(-squared / (2 * width**2)) if width > 0 else np.ones_like(squared)
    np.fill_diagonal(kernel, 0.0)
    labels = np.repeat([1.0, 0.0], n)
    rng = np.random.default_rng(seed)
    relabelled = np.stack([labels, *(rng.permutation(labels) for _ in range(permutations))])
    values = _mmd2(relabelled @ kernel, relabelled, kernel.sum(), n)
    value = float(values[0])
    p = float((values >= value - 1e-12).sum() / (permutations + 1))  # the true labels count as one permutation
    error = 1.96 * _jackknife(kernel, n)
    return value, (value - error, value + error), p


def _mmd2(products: np.ndarray, labels: np.ndarray, total: float, n: int) -> np.ndarray:
    """(m,) unbiased MMD^2 for (m, 2n) labels and their products with the kernel, whose diagonal is 0."""
    own = (products * labels).sum(axis=1)
    cross = products.sum(axis=1) - own
    other = total - own - 2 * cross
    return (own + other) / (n * (n - 1)) - 2 * cross / (n * n)


def _jackknife(kernel: np.ndarray, n: int) -> float:
    """Standard error of MMD^2, leaving out one row at a time from each group."""
    own_a, own_b, cross = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    sums = own_a.sum(), own_b.sum(), cross.sum()
    without_a = (
        (sums[0] - 2 * own_a.sum(axis=1)) / ((n - 1) * (n - 2))
        + sums[1] / (n * (n - 1))
        - 2 * (sums[2] - cross.sum(axis=1)) / (n * (n - 1))
    )
    without_b = (
        sums[0] / (n * (n - 1))
        + (sums[1] - 2 * own_b.sum(axis=1)) / ((n - 1) * (n - 2))
        - 2 * (sums[2] - cross.sum(axis=0)) / (n * (n - 1))
    )
    return jackknife_error(np.concatenate([without_a, without_b]))


def _sklearn(name: str) -> Any:
    """A module of scikit-learn, imported when it is first needed."""
    from importlib import import_module

    try:
        return import_module(f"sklearn.{name}")
    except ImportError as error:
        raise TellError(
            "scikit-learn is not installed", where="separation", remedy='pip install "tell-llm[study]"'
        ) from error
