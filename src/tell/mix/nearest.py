"""Ranks general rows by their nearness to the task rows: cross-task nearest neighbours (arXiv 2212.00196)."""

from __future__ import annotations

import numpy as np

CHUNK = 2048  # general rows that are standardised at once


def cosine_similarity(task: np.ndarray, general: np.ndarray) -> np.ndarray:
    """(n, m) float32 cosines of every task row with every general row.

    Each dimension is standardised over all n + m rows first, since in hidden states a few dimensions are larger than
    all the others together, and the same for every text.

    Args:
        task: (n, d) hidden states of the task rows.
        general: (m, d) those of the general rows.
    """
    parts = [task, *(general[i : i + CHUNK] for i in range(0, len(general), CHUNK))]
    count = len(task) + len(general)
    mean = sum(part.sum(axis=0, dtype=np.float64) for part in parts) / count
    variance = sum(np.square(part - mean).sum(axis=0) for part in parts) / count
    scale = np.sqrt(variance)
    scale[scale == 0] = 1.0  # alike in all rows: tells none from another
    first, *others = (_units((part - mean) / scale) for part in parts)
    return np.concatenate([first @ other.T for other in others], axis=1) if others else np.zeros((len(task), 0), "f4")


def _units(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths == 0, 1.0, lengths)).astype(np.float32)


def nearest_order(similarity: np.ndarray) -> np.ndarray:
    """(m,) int64, all general rows, the nearest first.

    Round by round, each task row in turn takes its nearest general row that is not yet taken, so that every task row
    is served alike: the first k rows are a union of nearest neighbours, for every k.

    Args:
        similarity: (n, m) of n > 0 task rows with m general rows.
    """
    n, m = similarity.shape
    left = similarity.astype(np.float32)
    order = np.empty(m, np.int64)
    for k in range(m):
        order[k] = left[k % n].argmax()
        left[:, order[k]] = -np.inf
    return order
