"""Tokenised rows of one source as flat arrays, for mixing and training."""

from __future__ import annotations

from collections.abc import Sequence
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


def joined(tables: Sequence[RowTable]) -> RowTable:
    """The rows of one or more tables of one source, in their order; equal notices once, facts of the first."""
    columns = ("hashes", "origins", "tokens", "trained", "unit", "ids", "mask")
    before = np.cumsum([0, *(int(table.starts[-1]) for table in tables)])
    starts = [table.starts[:-1] + start for table, start in zip(tables, before, strict=False)]
    weights = None
    if any(table.weights is not None for table in tables):
        weights = np.concatenate([np.ones(len(t)) if t.weights is None else t.weights for t in tables])
    return RowTable(
        source=tables[0].source,
        **{name: np.concatenate([getattr(table, name) for table in tables]) for name in columns},
        starts=np.concatenate([*starts, before[-1:]]).astype(np.int64),
        dropped=[row for table in tables for row in table.dropped],
        notices=list(dict.fromkeys(text for table in tables for text in table.notices)),
        facts=tables[0].facts,
        weights=weights,
    )
