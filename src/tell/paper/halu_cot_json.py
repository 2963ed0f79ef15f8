"""Halu-CoT-JSON, the paper's structured-output task, made from HaluEval rows (arXiv 2404.00914)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tell.errors import TellError
from tell.files import write_json, write_jsonl, write_text
from tell.paper.destination import Destination, writable_folder
from tell.paper.halueval import ANCHOR, SCHEMA, HaluRow, read_rows
from tell.paper.offline import OfflineTeacher
from tell.paper.teacher import Progress, Teacher, Thought, Usage

TRAIN_ROWS = 3001  # HaluEval general rows 0-3000 are the paper's training set, the rest its test set


@dataclass(frozen=True)
class Built:
    """The dataset that was written.

    Attributes:
        folder: of ``train.jsonl``, ``test.jsonl``, ``anchor.txt`` and ``schema.json``.
        train, test: rows written; test is 0 where no test rows were given.
        labels: training rows of each label.
        dropped: (origin, reason) of each row without a usable thought.
        usage: tokens and cost of a paid teacher.
        notices: sentences for the user.
    """

    folder: Path
    train: int
    test: int
    labels: dict[str, int]
    dropped: list[tuple[str, str]] = field(default_factory=list)
    usage: Usage | None = None
    notices: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A summary for the screen."""
        labels = ", ".join(f"{count:,} {label}" for label, count in sorted(self.labels.items()))
        out = [f"{self.train:,} training rows ({labels}) and {self.test:,} test rows in {self.folder}"]
        if self.dropped:
            origin, reason = self.dropped[0]
            out.append(f"{len(self.dropped):,} rows dropped, the first: {origin}: {reason}")
        if self.usage:
            out.append(self.usage.line())
        return out + self.notices


def build_halu_cot_json(
    source: str | Path,
    out: Destination,
    *,
    teacher: Teacher | None = None,
    rows: int | None = None,
    seed: int = 42,
    test: str | Path | None = None,
    progress: Progress | None = None,
) -> Built:
    """Write ``train.jsonl``, ``test.jsonl`` (``prompt``, ``completion``), ``anchor.txt`` and ``schema.json``.

    Completions are strict JSON of `SCHEMA` with the human label. Prompts leave the anchor out:
    anchor, an empty line and the prompt make the published prompt, byte for byte. The references of the
    test rows are always the offline teacher's, so that tests under different teachers compare; the paper's
    test set comes without marked passages, so its references quote none.

    Args:
        source: HaluEval's ``general_data.json`` (rows 0-3000 train, the rest test) or the paper's
            ``train_inputs.jsonl`` (all train); plain, ``.gz`` or ``.zst``.
        out: folder to write, or `Replace` with it to replace the dataset it holds; ``teacher.jsonl`` in it keeps the
            rows that a paid teacher has finished.
        teacher: writes the thoughts of the training rows; default offline.
        rows: this many training rows, a random subset by seed; a larger one contains the smaller one.
        seed: decides the subset.
        test: the paper's ``test.jsonl``, or HaluEval rows, to test on instead.
        progress: called with (rows done, rows in all).

    Raises:
        TellError: bad input, a dataset in `out` that must not be replaced, or a teacher that fails (the rows it
            finished are kept, and the same call continues from them). No file of the dataset is written then.
    """
    writer: Teacher = teacher or OfflineTeacher()
    folder = writable_folder(out)
    train, held_out, notices = _parts(source, test)
    if rows is not None and not 1 <= rows <= len(train):
        what, remedy = f"{rows:,} of {len(train):,} training rows are requested", f"Use 1 to {len(train):,}."
        raise TellError(what, where="--rows", remedy=remedy)
    chosen = train if rows is None else subset(train, rows, seed)
    thoughts = writer.write(chosen, cache=folder / "teacher.jsonl", progress=progress)
    kept = [(row, thought) for row, thought in zip(chosen, thoughts, strict=True) if thought.text is not None]
    dropped = [(row.origin, t.reason) for row, t in zip(chosen, thoughts, strict=True) if t.text is None]
    if not kept:
        what = f"teacher {writer.name} gave no usable thought for any of {len(chosen):,} rows ({dropped[0][1]})"
        raise TellError(what, where=str(source), remedy="Use another teacher, e.g. --teacher offline.")
    references = OfflineTeacher().write(held_out)
    write_text(folder / "anchor.txt", ANCHOR)
    write_json(folder / "schema.json", SCHEMA)
    if held_out:
        write_jsonl(folder / "test.jsonl", [_example(*pair) for pair in zip(held_out, references, strict=True)])
    else:
        (folder / "test.jsonl").unlink(missing_ok=True)  # of an earlier build
    write_jsonl(folder / "train.jsonl", [_example(*pair) for pair in kept])  # last: it marks the dataset as complete
    labels: dict[str, int] = {**Counter(row.label for row, _ in kept)}
    return Built(folder, len(kept), len(held_out), labels, dropped, writer.usage, notices)


def subset(rows: Sequence[HaluRow], count: int, seed: int) -> list[HaluRow]:
    """A seeded random subset in the order of `rows`; with the same seed a larger one contains a smaller one."""

    def rank(i: int) -> bytes:
        return hashlib.blake2b(f"{seed}\x00{i}\x00{rows[i].prompt}".encode(), digest_size=16).digest()

    return [rows[i] for i in sorted(sorted(range(len(rows)), key=rank)[:count])]


def _parts(source: str | Path, test: str | Path | None) -> tuple[list[HaluRow], list[HaluRow], list[str]]:
    """Training rows, test rows and notices."""
    rows, upstream = read_rows(source)
    train, held_out = (rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]) if upstream else (rows, [])
    notices = []
    if test is not None:
        held_out, _ = read_rows(test)
        prompts = {row.prompt for row in held_out}
        before = len(train)
        train = [row for row in train if row.prompt not in prompts]
        if len(train) < before:
            notices.append(f"{before - len(train):,} training rows are test rows too and were left out")
        if not train:
            raise TellError("every row is a test row too", where=str(source), remedy="Pass another --test.")
    elif not held_out:
        why = f"only {len(rows):,} rows" if upstream else "the paper's training inputs only"
        notices.append(f"no test.jsonl is written: {source} has {why}; pass the test rows with --test")
    return train, held_out, notices


def _example(row: HaluRow, thought: Thought) -> dict[str, str]:
    completion = {"thought": thought.text, "hallucination": row.label}
    return {"prompt": row.prompt, "completion": json.dumps(completion, ensure_ascii=False)}
