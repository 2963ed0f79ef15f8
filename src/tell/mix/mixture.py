"""The mixture: the exact order of training rows, built before any model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tell.arm import TASK_SOURCES
from tell.errors import TellError
from tell.mix.amount import Draw, check_size
from tell.mix.orderings import get_ordering
from tell.rows.row_table import RowTable
from tell.seeds import permutation

TASK, GENERAL, PSEUDO = "task", "general", "pseudo"
SOURCES = (TASK, GENERAL, PSEUDO)
"""Sources of rows, in the order in which a mixture has them."""
ANCHORED = frozenset({*TASK_SOURCES, PSEUDO})
"""Sources whose rows are of the task: they carry the anchor and ``train.task_weight``."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """n training rows in order.

    Attributes:
        sources: names of the sources that have rows here, in the order of `SOURCES`.
        source: (n,) int8, index into `sources`.
        row: (n,) int32, index into that source's table.
        repetition: (n,) int32, how often this row occurred before in the stream, in whatever form (`replaced`).
        tables: the table of each source in `sources`.
        ordering: name of the ordering.
        repeat: times each task row occurs (for `build_repeated` the most).
        seed: what it was drawn with.
        notices: sentences for the user.
    """

    sources: tuple[str, ...]
    source: np.ndarray
    row: np.ndarray
    repetition: np.ndarray
    tables: Mapping[str, RowTable] = field(repr=False)
    ordering: str
    repeat: int
    seed: int
    notices: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.source)

    def steps(self, batch_size: int) -> int:
        """Optimiser steps of one pass; the last batch may be smaller, nothing is dropped."""
        return -(-len(self) // _positive(batch_size))

    def examples_per_step(self, batch_size: int) -> np.ndarray:
        """(steps, sources) int64, rows of each source in each batch; sum over axis 1 for the batch sizes."""
        step = np.arange(len(self)) // _positive(batch_size)
        width = len(self.sources)
        flat = np.bincount(step * width + self.source, minlength=self.steps(batch_size) * width)
        return flat.reshape(-1, width)

    def column(self, name: str) -> np.ndarray:
        """(n,) a column of the tables (``tokens``, ``trained``, ``unit``, ``hashes``, ``origins``) in order."""
        parts = [getattr(self.tables[source], name) for source in self.sources]
        out = np.empty(len(self), dtype=np.result_type(*[np.asarray(part).dtype for part in parts]))
        for i, part in enumerate(parts):
            here = self.source == i
            out[here] = np.asarray(part)[self.row[here]]
        return out

    def counts(self) -> dict[str, object]:
        """``mixture`` of metrics.json: realised rows, tokens and ratio.

        Token counts include repetitions; ``ratio`` is of general to task tokens, counts each task row once and is None
        without task rows.
        Sources without rows are left out.
        """
        columns = {key: self.column(name) for key, name in COUNTED.items()}
        here = {name: self.source == i for i, name in enumerate(self.sources)}
        sums = {
            key: {name: int(column[where].sum(dtype=np.int64)) for name, where in here.items()}
            for key, column in columns.items()
        }
        once = 0
        if TASK in here:
            once = int(columns["unit_tokens"][here[TASK] & (self.repetition == 0)].sum(dtype=np.int64))
        general = sums["unit_tokens"].get(GENERAL, 0)
        return {
            "rows": {name: int(where.sum()) for name, where in here.items()},
            "unique_rows": {name: len(np.unique(self.row[where])) for name, where in here.items()},
            **sums,
            "ratio": general / once if once else None,
            "repeat": self.repeat,
            "order": self.ordering,
            "notices": list(self.notices),
        }

    def digest(self) -> str:
        """SHA-256 over the (source, content hash) sequence; equal digests mean equal training streams."""
        names = np.array(self.sources)[self.source]
        text = "".join(f"{name}\x00{key}\n" for name, key in zip(names, self.column("hashes"), strict=True))
        return hashlib.sha256(text.encode()).hexdigest()

    def replaced(self, places: np.ndarray, rows: np.ndarray, table: RowTable, notices: Sequence[str] = ()) -> Mixture:
        """The mixture with rows of another table in some places; all else stays where it is, repetitions too.

        Args:
            places: (m,) positions, each once.
            rows: (m,) the row of the table that comes to each.
            table: of a source that the mixture has not.
            notices: further sentences for the user.
        """
        if table.source in self.sources:
            raise ValueError(f"the mixture has rows of {table.source}")
        source, row = self.source.copy(), self.row.copy()
        sources, tables = self.sources, self.tables
        if len(places):
            source[places], row[places] = len(sources), _in_range(rows, table)
            sources, tables = (*sources, table.source), {**tables, table.source: table}
        said = (*self.notices, *notices)
        return replace(self, sources=sources, source=source, row=row, tables=tables, notices=said)


COUNTED = {"tokens": "tokens", "trained_tokens": "trained", "unit_tokens": "unit"}


def build(
    tables: Mapping[str, RowTable],
    *,
    general: Draw | None,
    repeat: int,
    ordering: str,
    seed: int,
    task_rows: np.ndarray | None = None,
    further: Mapping[str, int] | None = None,
) -> Mixture:
    """A mixture with every task row `repeat` times among the drawn general rows and rows of further sources.

    Repetition r of all task rows comes before repetition r + 1, each in its own permutation; general rows come
    in drawing order, so the same draw gives the `general` arm the same rows in the same order. Same seed, same
    mixture, in whatever order `tables` come.

    Args:
        tables: ``task`` (may be absent for the `general` arm), where `general` draws from it ``general``, and those of
            ``further``.
        general: rows from `general_rows`, or None.
        repeat: times each task row occurs, 1 or more.
        ordering: name in `ORDERINGS`.
        seed: decides places and permutations.
        task_rows: indices of the task rows to use, without repeats; None for all.
        further: rows of each further source, of which every epoch has its own permutation; the last one is cut.

    Raises:
        TellError: unknown ordering or source, repeat below 1, indices out of range, no row at all.
    """
    place = get_ordering(ordering)
    _check_sources(tables)
    if repeat < 1:
        raise TellError(f"{repeat} repetitions", where="mix.repeat", remedy="Set mix.repeat to 1 or more.")
    queues: dict[str, np.ndarray] = {}
    if TASK in tables and len(use := _task_rows(tables[TASK], task_rows)):
        check_size(len(use) * repeat, "mix.repeat", "task")
        queues[TASK] = _epochs(use, len(use) * repeat, seed)
    if general is not None and len(general):
        if GENERAL not in tables:
            raise TellError("general rows were drawn but there is no general table", where="mix")
        queues[GENERAL] = _in_range(general.indices, tables[GENERAL])
    queues |= _queues(tables, further or {}, seed)
    notices = tuple(general.notices) if general is not None else ()
    return _mixture(
        tables,
        queues,
        place({name: len(queue) for name, queue in queues.items()}, seed),
        ordering,
        repeat,
        seed,
        notices,
    )


def build_repeated(table: RowTable, total_rows: int, seed: int, task_rows: np.ndarray | None = None) -> Mixture:
    """A mixture of task rows alone, epoch after epoch until `total_rows`: the step-matched SFT arm.

    Whole seeded epochs, the last one partial, so ceil(total_rows / batch size) steps. Each epoch has the order of the
    same repetition in `build` with the same seed.

    Args:
        table: the task rows.
        total_rows: rows of the stream, e.g. ``len(mixture)`` of the arm to match.
        seed: decides the permutation of each epoch.
        task_rows: indices of the rows to use; None for all.

    Raises:
        TellError: no task rows, or total_rows below 1.
    """
    use = _task_rows(table, task_rows)
    if total_rows < 1 or not len(use):
        raise TellError(
            f"{total_rows} rows requested of {len(use)} task rows", where="mix", remedy="Use one row or more of each."
        )
    queues = {TASK: _epochs(use, total_rows, seed)}
    places = np.zeros(total_rows, dtype=np.int8)
    return _mixture({TASK: table}, queues, places, "shuffle", -(-total_rows // len(use)), seed, ())


def build_counted(tables: Mapping[str, RowTable], counts: Mapping[str, int], *, ordering: str, seed: int) -> Mixture:
    """A mixture of so many rows of each source, epoch after epoch, the last one cut.

    Args:
        tables: of each source.
        counts: rows of each source.
        ordering: name in `ORDERINGS`.
        seed: decides places and the permutation of each epoch, for task rows those of `build`.

    Raises:
        TellError: unknown ordering or source, or no row at all.
    """
    place = get_ordering(ordering)
    _check_sources(tables)
    queues = _queues(tables, counts, seed)
    repeat = -(-len(queues[TASK]) // len(tables[TASK])) if TASK in queues else 1
    return _mixture(
        tables, queues, place({name: len(queue) for name, queue in queues.items()}, seed), ordering, repeat, seed, ()
    )


def _queues(tables: Mapping[str, RowTable], counts: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """The rows of each source in their order, for sources with rows."""
    queues = {}
    for name in SOURCES:
        if (count := counts.get(name, 0)) and len(tables[name]):
            check_size(count, f"mix.{name}", name)
            queues[name] = _epochs(np.arange(len(tables[name]), dtype=np.int32), count, seed, name)
    return queues


def _check_sources(tables: Mapping[str, RowTable]) -> None:
    if unknown := sorted(set(tables) - set(SOURCES)):
        named = ", ".join(SOURCES)
        raise TellError(f"source {unknown[0]!r} is unknown", where="mix", remedy=f"Name sources {named}.")


def _mixture(
    tables: Mapping[str, RowTable],
    queues: dict[str, np.ndarray],
    places: np.ndarray,
    ordering: str,
    repeat: int,
    seed: int,
    notices: tuple[str, ...],
) -> Mixture:
    if not len(places):
        raise TellError("the mixture has no row", where="mix", remedy="Provide task rows or a general amount above 0.")
    row = np.empty(len(places), dtype=np.int32)
    repetition = np.empty(len(places), dtype=np.int32)
    for i, queue in enumerate(queues.values()):  # in the order of `SOURCES`
        row[places == i] = queue
        repetition[places == i] = _occurrence(queue)
    used = {name: tables[name] for name in queues}
    return Mixture(tuple(used), places, row, repetition, used, ordering, repeat, seed, notices)


def _epochs(use: np.ndarray, total: int, seed: int, source: str = TASK) -> np.ndarray:
    """(total,) rows: whole permutations of `use`, the last one cut."""
    epochs = [use[permutation(len(use), seed, source, r)] for r in range(-(-total // len(use)))]
    return np.concatenate(epochs)[:total]


def _occurrence(rows: np.ndarray) -> np.ndarray:
    """(n,) how often rows[i] occurs in rows[:i]."""
    by_row = np.argsort(rows, kind="stable")
    ordered = rows[by_row]
    first = np.searchsorted(ordered, ordered)  # where each value's run begins
    out = np.empty(len(rows), dtype=np.int32)
    out[by_row] = np.arange(len(rows)) - first
    return out


def _task_rows(table: RowTable, task_rows: np.ndarray | None) -> np.ndarray:
    if task_rows is None:
        return np.arange(len(table), dtype=np.int32)
    use = np.sort(_in_range(np.asarray(task_rows), table))  # sorted, so that their order does not matter
    if len(np.unique(use)) < len(use):
        raise TellError("task_rows names a row twice", where="mix", remedy="Name each row once and set mix.repeat.")
    return use


def _in_range(rows: np.ndarray, table: RowTable) -> np.ndarray:
    if len(rows) and (rows.min() < 0 or rows.max() >= len(table)):
        bad = int(rows.max() if rows.max() >= len(table) else rows.min())
        raise TellError(f"row {bad} is not among {len(table)} {table.source} rows", where="mix")
    return rows.astype(np.int32)


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise TellError(f"{batch_size} examples a step", where="train.batch_size", remedy="Set it to 1 or more.")
    return batch_size
