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
from tell.paper.halueval import ANCHOR, SCHEMA, HaluRow, read_rows
from tell.paper.offline import OfflineTeacher
from tell.paper.teacher import Progress, Teacher, Thought, Usage

TRAIN_ROWS = 3001  # HaluEval general rows 0-3000 are the paper's training set, the rest its test set


@dataclass(frozen=True)
class Built:
    """What was made.

    Attributes:
        folder: where ``train.jsonl``, ``test.jsonl``, ``anchor.txt`` and ``schema.json`` lie.
        train, test: rows written; test is 0 where no test rows were given.
        labels: training rows of each label.
        dropped: (origin, reason) of each row the teacher gave no usable thought for.
        usage: tokens and cost of a bought teacher.
        notices: what else the user should hear.
    """

    folder: Path
    train: int
    test: int
    labels: dict[str, int]
    dropped: list[tuple[str, str]] = field(default_factory=list)
    usage: Usage | None = None
    notices: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The outcome in words, a line each."""
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
    out: str | Path,
    *,
    teacher: Teacher | None = None,
    rows: int | None = None,
    seed: int = 42,
    test: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Write ``train.jsonl``, ``test.jsonl`` (``prompt``, ``completion``), ``anchor.txt`` and ``schema.json``.

    Completions are strict JSON of `SCHEMA` under the people's label. Prompts leave the anchor out:
    anchor, an empty line and the prompt make the published prompt, byte for byte. The references of the
    test rows are always the offline teacher's, so that tests under different teachers compare; the paper's
    test set comes without marked passages, so its references quote none.

    Args:
        source: HaluEval's ``general_data.json`` (rows 0-3000 train, the rest test) or the paper's
            ``train_inputs.jsonl`` (all train); plain, ``.gz`` or ``.zst``.
        out: folder to write; ``teacher.jsonl`` in it keeps what a bought teacher has finished.
        teacher: writes the thoughts of the training rows; default offline.
        rows: this many training rows, a random subset by seed; a larger one holds the smaller one.
        seed: decides the subset.
        test: the paper's ``test.jsonl``, or HaluEval rows, to test on instead.
        overwrite: replace a dataset that lies in `out`.
        progress: called with (rows done, rows in all).

    Raises:
        TellError: bad input, a dataset that lies there already, or a teacher that fails (what it finished
            is kept; the same call goes on from there). No file of the dataset is written then.
    """
    teacher = teacher or OfflineTeacher()
    out = Path(out)
    if (out / "train.jsonl").exists() and not overwrite:
        raise TellError("holds a dataset already", where=str(out), remedy="Give another folder, or --overwrite.")
    if out.exists() and not out.is_dir():
        raise TellError("is a file, not a folder", where=str(out), remedy="Give another folder with --out.")
    train, held_out, notices = _parts(source, test)
    if rows is not None and not 1 <= rows <= len(train):
        raise TellError(
            f"{rows:,} training rows are asked of {len(train):,}",
            where="--rows",
            remedy=f"Ask for 1 to {len(train):,}.",
        )
    chosen = train if rows is None else subset(train, rows, seed)
    thoughts = teacher.write(chosen, cache=out / "teacher.jsonl", progress=progress)
    kept = [(row, thought) for row, thought in zip(chosen, thoughts, strict=True) if thought.text is not None]
    dropped = [(row.origin, t.reason) for row, t in zip(chosen, thoughts, strict=True) if t.text is None]
    if not kept:
        raise TellError(
            f"teacher {teacher.name} gave no usable thought for any of {len(chosen):,} rows ({dropped[0][1]})",
            where=str(source),
            remedy="Use another teacher, e.g. --teacher offline.",
        )
    references = OfflineTeacher().write(held_out)
    write_text(out / "anchor.txt", ANCHOR)
    write_json(out / "schema.json", SCHEMA)
    if held_out:
        write_jsonl(out / "test.jsonl", [_example(*pair) for pair in zip(held_out, references, strict=True)])
    else:
        (out / "test.jsonl").unlink(missing_ok=True)  # one of an earlier build would not belong to this one
    write_jsonl(out / "train.jsonl", [_example(*pair) for pair in kept])  # last: it says that all is there
    labels = dict(Counter(row.label for row, _ in kept))
    return Built(out, len(kept), len(held_out), labels, dropped, teacher.usage, notices)


def subset(rows: Sequence[HaluRow], count: int, seed: int) -> list[HaluRow]:
    """A seeded random subset in the order of `rows`; with the same seed a larger one holds a smaller one."""

    def rank(i: int) -> bytes:
        return hashlib.blake2b(f"{seed}\x00{i}\x00{rows[i].prompt}".encode(), digest_size=16).digest()

    return [rows[i] for i in sorted(sorted(range(len(rows)), key=rank)[:count])]


def _parts(source: str | Path, test: str | Path | None) -> tuple[list[HaluRow], list[HaluRow], list[str]]:
    """Training rows, test rows, and what to say about them."""
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
            raise TellError("every row is a test row too", where=str(source), remedy="Give another --test.")
    elif not held_out:
        why = f"only {len(rows):,} rows" if upstream else "the paper's training inputs only"
        notices.append(f"no test.jsonl is written: {source} has {why}; give the test rows with --test")
    return train, held_out, notices


def _example(row: HaluRow, thought: Thought) -> dict[str, str]:
    completion = {"thought": thought.text, "hallucination": row.label}
    return {"prompt": row.prompt, "completion": json.dumps(completion, ensure_ascii=False)}
