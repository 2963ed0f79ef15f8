"""The rows of a task: read from its files, split, their kind detected; what needs no model. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tell.config import Config
from tell.data.example import Example
from tell.data.form import form_of
from tell.data.kind import Kind, detect_kind, load_schema, missing_classes, widen
from tell.data.overlap import Overlap, find_overlap
from tell.data.sources import BadRows, Loaded, load
from tell.data.split import Splits, split, split_given_test, with_validation
from tell.data.subset import take_rows
from tell.errors import TellError

PAIRS_KEPT = 20
FEW_ROWS = 30  # with fewer rows none is set aside for validation


class Read(NamedTuple):
    """A task's rows; its test rows, schema and validation rows where they are given."""

    data: Loaded
    test: Loaded | None = None
    schema: dict | None = None
    validation: Loaded | None = None

    @property
    def files(self) -> list[Loaded]:
        """All rows by file."""
        return [found for found in (self.data, self.test, self.validation) if found is not None]


@dataclass(frozen=True)
class DataFacts:
    """Data read and findings made before training; parts of findings.json and plan.json.

    Attributes:
        data, test: path, layout, columns and rows of each file; ``test`` is None where no test file was given.
        duplicates: of the split, as findings.json has them.
        overlap: ``train_test`` of findings.json.
        overlap_dropped: training rows left out as near-duplicates of a test row.
        dropped_rows: origin and reason of each row left out.
    """

    data: dict
    test: dict | None
    duplicates: dict[str, int]
    overlap: dict
    overlap_dropped: int
    dropped_rows: list[dict]


@dataclass(frozen=True)
class TaskRows:
    """What of a task needs no model: its rows as a run splits them, and their kind.

    Attributes:
        train, validation, test, kind, facts: as of `Task`; ``validation`` whole.
        held_out: all test rows, also those that ``task.test_rows`` leaves unscored.
        widened: notice about a schema that had to be widened for test rows; empty where it was not.
        missing: notices about labels without training or without test rows.
        lost: notice about rows of ``task.validation`` that are in another part too; empty where there are none.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    kind: Kind
    facts: DataFacts
    held_out: list[Example]
    widened: str
    missing: list[str]
    lost: str = ""


def read_task(config: Config, bad_rows: BadRows | None = None) -> Read:
    """The task's rows, and its test rows, schema and validation rows where they are given.

    Args:
        bad_rows: as of `tell.data.sources.load`.

    Raises:
        TellError: no data, or it cannot be read.
    """
    task = config.task
    if not task.data:
        raise TellError(
            "no task data given",
            where="task.data",
            remedy="Pass a file, e.g. `tell tune tickets.jsonl`; `tell demo` runs on a built-in task.",
        )
    schema = load_schema(task.json_schema) if task.json_schema else None

    columns = form_of(task) or task.columns
    data = load(task.data, name="task", columns=columns, bad_rows=bad_rows)
    given = held = None
    if task.test is not None:
        given = load(task.test, name="task", columns=data.form or columns, bad_rows=bad_rows, lists=data.lists)
        if given.lists and not data.lists:  # rows with one label each, where test rows have several
            data = load(task.data, name="task", columns=columns, bad_rows=bad_rows, lists=True)
    if task.validation is not None:
        held = load(task.validation, name="task", columns=data.form or columns, bad_rows=bad_rows, lists=data.lists)
    return Read(data, given, schema, held)


def split_task(config: Config, read: Read) -> TaskRows:
    """The rows of a task as a run splits them, their kind, and the findings about them.

    Raises:
        TellError: too few rows, or answers that are not of the requested kind.
    """
    data, given, schema, held = read
    parts, lost = _split(config, data, given), 0
    if held is not None:
        parts, lost = with_validation(parts, held.examples)
    known = [*parts.train, *parts.validation]
    kind, widened = widen(detect_kind(known, override=config.task.kind, schema=schema), known, parts.test)
    test = parts.test
    if config.task.test_rows and config.task.test_rows < len(test):
        test = [test[i] for i in sorted(take_rows(len(test), config.task.test_rows, config.seed))]
    overlap = find_overlap(parts.train, test)
    train = _without_overlap(config, parts.train, overlap)
    dropped = [row for loaded in read.files for row in loaded.dropped]
    facts = DataFacts(
        data=describe(data),
        test=describe(given) if given else None,
        duplicates={
            "exact_duplicates_removed": parts.exact_duplicates if given else 0,
            "exact_duplicates_kept_together": 0 if given else parts.exact_duplicates,
        },
        overlap=overlap_facts(overlap, parts.train, test),
        overlap_dropped=len(parts.train) - len(train),
        dropped_rows=[{"origin": origin, "reason": reason} for origin, reason in dropped],
    )
    missing = missing_classes(kind, known, test)
    twice = f"rows left out because they are in two parts: {lost:,}" if lost else ""
    return TaskRows(train, parts.validation, test, kind, facts, parts.test, widened or "", missing, twice)


def _split(config: Config, data: Loaded, given: Loaded | None) -> Splits:
    # With few rows all are needed for training; anchors are then scored on training rows.
    own = config.task.validation is None and len(data.examples) >= FEW_ROWS
    share = config.task.validation_fraction if own else 0.0
    if given is not None:
        return split_given_test(data.examples, given.examples, seed=config.seed, validation_fraction=share)
    fraction = config.task.test_fraction
    return split(data.examples, test_fraction=fraction, seed=config.seed, validation_fraction=share)


def _without_overlap(config: Config, train: list[Example], overlap: Overlap) -> list[Example]:
    """The training rows, without near-duplicates of test rows where ``task.drop_overlap`` says so."""
    if not config.task.drop_overlap:
        return train
    kept = [e for i, e in enumerate(train) if i not in overlap.indices]
    if not kept:
        raise TellError(
            f"all {len(train)} training rows nearly equal a test row",
            where=config.task.data,
            remedy="Leave out --drop-overlap, or use other test rows.",
        )
    return kept


def describe(data: Loaded) -> dict:
    """``data`` of findings.json."""
    facts = {"path": data.path, "layout": data.layout, "columns": data.columns, "rows": len(data.examples)}
    return facts | ({"form": data.form.to_dict()} if data.form else {})


def overlap_facts(overlap: Overlap, rows: Sequence[Example], test: Sequence[Example]) -> dict:
    """Counts and the first pairs, with their texts, for findings.json."""
    pairs = [
        {
            "a": rows[p.a_index].origin,
            "b": test[p.test_index].origin,
            "similarity": round(p.similarity, 3),
            "a_text": rows[p.a_index].question[:300],
            "b_text": test[p.test_index].question[:300],
        }
        for p in overlap.pairs[:PAIRS_KEPT]
    ]
    return {"exact": overlap.exact, "near": overlap.near, "pairs": pairs}
