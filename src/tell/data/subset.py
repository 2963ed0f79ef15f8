"""Seeded random subsets by rows or tokens; with the same seed a larger budget contains the smaller one."""

from __future__ import annotations

import numpy as np

from tell.errors import TellError
from tell.seeds import shuffled


def take_rows(n_items: int, rows: int, seed: int) -> np.ndarray:
    """(rows,) int64 indices: the first ``rows`` of a seeded permutation of ``n_items``.

    Raises:
        TellError: fewer than one row, or more than exist.
    """
    if rows < 1:
        raise TellError(f"a budget of {rows} rows leaves nothing", remedy="Set it to 1 row or more.")
    if rows > n_items:
        remedy = f"Ask for at most {n_items:,} rows, or give more data."
        raise TellError(f"{rows:,} rows are requested, but only {n_items:,} exist", remedy=remedy)
    return shuffled(n_items, seed)[:rows]


def take_tokens(unit: np.ndarray, budget: float, seed: int) -> np.ndarray:
    """Indices of a seeded random subset whose tokens come nearest to the budget.

    Rows are taken in the order of the permutation that `take_rows` uses; the row that crosses the budget
    stays when that is nearer. A budget below the first row's tokens takes that row.

    Args:
        unit: (n,) tokens of each row, in the unit of counting.
        budget: tokens wanted.

    Returns:
        (k,) int64, k >= 1; ``abs(unit[result].sum() - budget)`` is at most the tokens of one row.

    Raises:
        TellError: no rows, a budget that is not positive, or one above all tokens there are.
    """
    unit = np.asarray(unit, dtype=np.int64)
    total = int(unit.sum())
    if not budget > 0:
        raise TellError(f"a budget of {budget:g} tokens leaves nothing", remedy="Set it to more than 0 tokens.")
    if not len(unit) or budget > total:
        what = f"{budget:,.0f} tokens are requested, but only {total:,} exist in {len(unit):,} rows"
        raise TellError(what, remedy=f"Ask for at most {total:,} tokens, or give more data.")
    order = shuffled(len(unit), seed)
    sums = np.cumsum(unit[order])
    above = int(np.searchsorted(sums, budget))  # first prefix, of above + 1 rows, that reaches the budget
    over = int(sums[above]) - budget
    under = budget - int(sums[above - 1]) if above else np.inf
    return order[: above if under < over else above + 1]
