"""Draws an amount of general data: rows, tokens, or a ratio to the task's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tell.errors import TellError
from tell.seeds import permutation

MOST_ROWS = 10_000_000  # rows of a mixture; more is a typo, and the indices alone would fill the memory


@dataclass(frozen=True, slots=True)
class Draw:
    """Rows drawn from one source.

    Attributes:
        indices: (n,) int32 into the source's table, in drawing order; a row occurs again only after the
            source was exhausted.
        epochs: n divided by the rows of the source.
        notices: sentences for the user, e.g. that the source was exhausted.
    """

    indices: np.ndarray
    epochs: float
    notices: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)

    def first(self, rows: int) -> Draw:
        """The first rows of the draw, without the notices about the whole draw."""
        if rows >= len(self):
            return self
        epochs = self.epochs * rows / max(1, len(self))
        notices = [f"the general source is passed {epochs:.2f} times"] if epochs > 1 else []
        return Draw(self.indices[:rows], epochs, notices)


def general_rows(
    unit: np.ndarray,
    *,
    task_tokens: int,
    ratio: float | None = None,
    tokens: float | None = None,
    rows: int | None = None,
    seed: int,
    order: np.ndarray | None = None,
) -> Draw:
    """General rows drawn without replacement; once all are used, further epochs in new permutations.

    Pass exactly one of ratio, tokens and rows; 0 draws nothing. With the same seed a larger amount extends a smaller
    one, so the cells of a scaling grid are nested.

    With `order` the rows drawn are the first of it, still in the places of the random draw: which rows there are is
    all that changes, and a draw of the whole source stays as it is.

    Args:
        unit: (m,) tokens of each general row in the unit of counting.
        task_tokens: tokens of the task rows in the same unit, each row counted once however often repeated.
        ratio: general tokens for each task token.
        tokens: general tokens, met as nearly as whole rows allow.
        rows: general rows, met exactly.
        seed: decides the permutation of each epoch.
        order: (m,) permutation of the rows, by which they are preferred where the source is not exhausted.

    Raises:
        TellError: no or several amounts, a negative or infinite one, a positive one from an empty source,
            a ratio to zero task tokens.
    """
    given = {k: v for k, v in (("ratio", ratio), ("tokens", tokens), ("rows", rows)) if v is not None}
    if len(given) != 1:
        what = f"{' and '.join(given) or 'none of ratio, tokens, rows'} given"
        raise TellError(what, where="general", remedy="Set one of general.ratio, general.tokens, general.rows.")
    ((way, amount),) = given.items()
    where = f"general.{way}"
    if not np.isfinite(amount) or amount < 0 or (way == "rows" and amount != int(amount)):
        kind = "a whole number, 0 or more" if way == "rows" else "0 or more"
        raise TellError(f"{amount} is not {kind}", where=where, remedy=f"Set {where} to {kind}.")
    if amount == 0:
        return Draw(np.empty(0, np.int32), 0.0)
    if not len(unit):
        what = f"{amount:g} is requested from an empty general source"
        raise TellError(what, where=where, remedy="Set a general source with rows, or 0.")
    unit = np.asarray(unit, dtype=np.int64)
    if way == "rows":
        return _draw(len(unit), int(amount), seed, where, order=order)
    if way == "ratio" and task_tokens <= 0:
        what = f"ratio {amount:g} to {task_tokens} task tokens is undefined"
        raise TellError(what, where=where, remedy="Set general.tokens or general.rows instead.")
    target = float(amount) * task_tokens if way == "ratio" else float(amount)
    return _draw(len(unit), _rows_for(unit, target, seed, where, order), seed, where, target, order)


def _rows_for(unit: np.ndarray, target: float, seed: int, where: str, order: np.ndarray | None) -> int:
    """Number of rows, in drawing order, whose tokens come nearest to the target; the smaller of two equally near."""
    epoch_tokens = int(unit.sum())
    if epoch_tokens == 0:
        remedy = "Check the answers of the general source."
        raise TellError("the general rows have no tokens", where=where, remedy=remedy)
    check_size(target / epoch_tokens * len(unit), where)
    whole = int(target // epoch_tokens)
    last = order if order is not None and not whole else drawing_order(len(unit), seed, whole)
    reached = np.concatenate([[0], np.cumsum(unit[last])])
    rest = target - whole * epoch_tokens
    after = int(np.searchsorted(reached, rest))  # reached[after - 1] < rest <= reached[after]
    after = min(after, len(unit))
    before = max(after - 1, 0)
    nearest = before if rest - reached[before] <= reached[after] - rest else after
    return whole * len(unit) + nearest


def _draw(
    size: int, count: int, seed: int, where: str, target: float | None = None, order: np.ndarray | None = None
) -> Draw:
    check_size(count, where)
    epochs = [drawing_order(size, seed, e) for e in range(-(-count // size))]
    indices = np.concatenate(epochs)[:count] if epochs else np.empty(0)
    if order is not None and 0 < count < size:
        indices = epochs[0][np.isin(epochs[0], order[:count])]
    notices = []
    if count > size:
        notices.append(
            f"general data is exhausted: {count:,} rows are requested and the source has {size:,}, so it is passed "
            f"{count / size:.2f} times, each time in a new order"
        )
    if target is not None and count == 0:
        notices.append(f"{target:,.0f} general tokens are less than half of one row: no general row is drawn")
    return Draw(indices.astype(np.int32), count / size, notices)


def drawing_order(size: int, seed: int, epoch: int = 0) -> np.ndarray:
    """(size,) the rows of a source in the order in which an epoch of it is drawn."""
    return permutation(size, seed, "general", epoch)


def check_size(count: float, where: str, kind: str = "general") -> None:
    """Refuse more than `MOST_ROWS` rows."""
    if count > MOST_ROWS:
        raise TellError(f"requests {count:,.0f} {kind} rows", where=where, remedy=f"Set at most {MOST_ROWS:,} rows.")
