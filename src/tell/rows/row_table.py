"""Tokenised rows of one source as flat arrays, for mixing and training."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Dropped:
    """A row that cannot be trained on: where it came from and why."""

    origin: str
    reason: str


@dataclass(slots=True)
class RowTable:
    """n tokenised rows of one source, in the order they were read.

    Attributes:
        source: ``"task"``, ``"general"``, ...
        hashes: (n,) content hashes of the examples, str.
        origins: (n,) ``file:line`` of each, str.
        tokens: (n,) int32, length of the rendered row in the model's tokens.
        trained: (n,) int32, tokens that carry loss.
        unit: (n,) int32, tokens of the bare contents (anchor included, template not) in the unit of
            counting; budgets and ratios are in these.
        ids: (sum of tokens,) int32, all rows concatenated; may be memory-mapped.
        mask: (sum of tokens,) bool, True where the token is trained.
        starts: (n + 1,) int64, row i is ``ids[starts[i]:starts[i + 1]]``.
        dropped: rows left out, with reasons.
        notices: sentences for the user about all rows.
        facts: about the source they were read from, for findings.json.
        weights: (n,) float64 in (0, 1], by which each row's loss is multiplied in training; None: 1 for all.
    """

    source: str
    hashes: np.ndarray
    origins: np.ndarray
    tokens: np.ndarray
    trained: np.ndarray
    unit: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    starts: np.ndarray
    dropped: list[Dropped] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of row i, both of length ``tokens[i]``."""
        span = slice(int(self.starts[i]), int(self.starts[i + 1]))
        return self.ids[span], self.mask[span]

    def weight(self, i: int) -> float:
        """Weight of row i."""
        return 1.0 if self.weights is None else float(self.weights[i])
