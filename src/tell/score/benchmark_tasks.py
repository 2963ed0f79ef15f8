"""Benchmarks of general ability: their tasks in lm-evaluation-harness, local files for them, and means over tasks.

The harness reads the hub's copies of AGIEval (``hails/agieval-*``), whose ``query`` is AGIEval's own zero-shot prompt;
the files of AGIEval's repository hold its parts, which are joined here in the same way. A test compares sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tell.data.formats import check_file, format_of, read_records
from tell.errors import TellError, did_you_mean
from tell.files import expanded
from tell.score.means import ratio
from tell.score.scored import Metric

Row = dict[str, Any]
AGIEVAL_EN = (
    *("aqua_rat", "gaokao_english", "logiqa_en", "lsat_ar", "lsat_lr", "lsat_rc", "math"),
    *("sat_en_without_passage", "sat_en", "sat_math"),
)
AGIEVAL_CN = (
    *("gaokao_biology", "gaokao_chemistry", "gaokao_chinese", "gaokao_geography", "gaokao_history"),
    *("gaokao_mathcloze", "gaokao_mathqa", "gaokao_physics", "jec_qa_ca", "jec_qa_kd", "logiqa_zh"),
)
PREFIX = "agieval_"
GROUPS: dict[str, tuple[str, ...]] = {
    "agieval": tuple(PREFIX + name for name in (*AGIEVAL_CN, *AGIEVAL_EN)),
    "agieval_en": tuple(PREFIX + name for name in AGIEVAL_EN),
    "agieval_cn": tuple(PREFIX + name for name in AGIEVAL_CN),
}
SHOTS = {"gsm8k": 5, "openbookqa": 0}  # the harness's own; only these have training rows for examples
CLOZE = ("agieval_math", "agieval_gaokao_mathcloze")
LETTERS = "ABCDEFG"


@dataclass(frozen=True)
class LocalTask:
    """One task's rows from files, in the columns the harness expects.

    Attributes:
        train: rows to show as examples; empty if none are shown.
        digest: 16 hexadecimal digits over the files.
        dropped: number of rows left out because their answer key is unusable.
    """

    test: list[Row]
    train: list[Row]
    digest: str
    dropped: int


def benchmark_tasks(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The harness's tasks of each requested benchmark: one, or those of an AGIEval group.

    Raises:
        TellError: an unknown name, with the nearest.
    """
    known, names = [*SHOTS, *GROUPS, *GROUPS["agieval"]], list(names)
    if unknown := [name for name in names if name not in known]:
        raise TellError(
            f"unknown benchmark {unknown[0]!r}",
            where="benchmarks",
            nearest=did_you_mean(unknown[0], known),
            remedy=f"Use {', '.join([*SHOTS, *GROUPS])}, or one task of AGIEval, e.g. agieval_sat_math.",
        )
    return {name: GROUPS.get(name, (name,)) for name in names}


def task_shots(task: str, shots: int | None) -> int:
    """Examples shown before each question: ``shots``, or the harness's own number.

    None for AGIEval, which has test rows only: the harness would show other test rows, perhaps the question itself.
    """
    return 0 if task not in SHOTS else SHOTS[task] if shots is None else shots


def _stem(task: str, part: str) -> str:
    """Path of a task's file in the folder, without its suffix."""
    return f"{task}_{part}" if task in SHOTS else f"agieval/{task.removeprefix(PREFIX).replace('_', '-')}"


def local_files(task: str, folder: str | Path) -> dict[str, Path]:
    """Files of a task by part: ``test`` and, if there is one, ``train``; none without ``test``.

    ``gsm8k_test.jsonl.gz``, ``openbookqa_train.jsonl``, ``agieval/lsat-ar.jsonl``: any format TELL reads.

    Raises:
        TellError: ``folder`` is not a folder.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise TellError("no such folder", where=str(folder), remedy="Name the folder with the benchmarks' files.")
    found = {}
    for part in ("test", "train") if task in SHOTS else ("test",):
        if matches := sorted(path for path in root.glob(f"{_stem(task, part)}.*") if format_of(path)):
            found[part] = matches[0]
    return found if "test" in found else {}


def local_tasks(groups: dict[str, tuple[str, ...]], folder: str | Path) -> dict[str, tuple[str, ...]]:
    """``groups`` without the tasks that have no files.

    Raises:
        TellError: a benchmark without any file.
    """
    out = {name: tuple(task for task in tasks if local_files(task, folder)) for name, tasks in groups.items()}
    if missing := [name for name, tasks in out.items() if not tasks]:
        remedy = f"Put e.g. {_stem(groups[missing[0]][0], 'test')}.jsonl there, or leave {missing[0]} out."
        raise TellError(f"has no file for {missing[0]}", where=str(folder), remedy=remedy)
    return out


def read_task(task: str, folder: str | Path, *, shots: int) -> LocalTask:
    """Rows of one task, as the harness's own dataset has them.

    Args:
        shots: examples shown before each question; with 0 the training file is not read.

    Raises:
        TellError: no file, a column that is missing, or fewer training rows than examples.
    """
    found = local_files(task, folder)
    if not found:
        raise TellError(f"has no file for {task}", where=str(folder), remedy="Check --benchmark-data.")
    if shots and "train" not in found:
        train = Path(folder) / f"{_stem(task, 'train')}.jsonl"
        check_file(train, remedy="Put it there, or use --benchmark-shots 0.")
    parts = {part: path for part, path in found.items() if part == "test" or shots}
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in parts.values()))
    rows, dropped = {}, 0
    for part, path in parts.items():
        read = [_converted(task, row, f"{path}:{number}") for number, row in read_records(path)]
        rows[part] = [row for row in read if row is not None]
        dropped += len(read) - len(rows[part])
        usable = len(rows[part])
        if not usable or (part == "train" and usable < shots):
            raise TellError(f"has {usable} usable rows", where=str(path), remedy="Use the benchmark's whole file.")
    return LocalTask(rows["test"], rows.get("train", []), digest.hexdigest()[:16], dropped)


def group_mean(tasks: Sequence[Metric]) -> Metric:
    """The arithmetic mean of tasks' means, weighted equally regardless of their number of rows (paper, A.5).

    Intervals come from resampling the rows of all tasks together; a task without a row in a resample is left out of it.
    """
    if len(tasks) == 1:
        return tasks[0]
    stats = np.zeros((sum(len(task.stats) for task in tasks), 2 * len(tasks)))
    begin = 0
    for i, task in enumerate(tasks):
        stats[begin : begin + len(task.stats), 2 * i : 2 * i + 2] = task.stats
        begin += len(task.stats)

    def combine(sums: np.ndarray) -> np.ndarray:
        return np.nanmean(ratio(sums.reshape(*sums.shape[:-1], len(tasks), 2)), axis=-1)

    return Metric(stats, combine, np.concatenate([task.per_row for task in tasks]))


def _converted(task: str, row: Row, where: str) -> Row | None:
    """A row in the hub's columns; None if its answer key is unusable."""
    if task == "gsm8k":
        return {"question": _text(row, "question", where), "answer": _text(row, "answer", where)}
    if task == "openbookqa":
        return _openbookqa(row, where)
    return _agieval(task, row, where)


def _openbookqa(row: Row, where: str) -> Row:
    question = _text(row, "question_stem", where)
    choices = row.get("choices")
    if isinstance(choices, dict):  # as on the hub
        texts, labels, key = choices["text"], choices["label"], _text(row, "answerKey", where)
    else:
        texts = _texts(row, "choices", where)
        labels, key = list(LETTERS[: len(texts)]), _text(row, "answer", where)
    if key.strip() not in labels:
        raise TellError(f"the answer {key!r} is not one of {', '.join(labels)}", where=where, remedy="Fix that row.")
    return {"question_stem": question, "choices": {"text": texts, "label": labels}, "answerKey": key.strip()}


def _agieval(task: str, row: Row, where: str) -> Row | None:
    """AGIEval's ``convert_zero_shot`` (src/dataset_loader.py of its repository), as the hub's copies have it."""
    if "query" in row:
        return {key: row[key] for key in ("query", "answer", "choices", "gold") if row.get(key) is not None}
    passage, question = row.get("passage") or "", _text(row, "question", where)
    chinese = task.removeprefix(PREFIX) in AGIEVAL_CN
    if task in CLOZE:
        asked = f"问题：{question}\n答案：" if chinese else f"Q: {question}\nA: The answer is"
        return {"query": passage + asked, "answer": _text(row, "answer", where)}
    options = _texts(row, "options", where)
    last, shown = LETTERS[len(options) - 1], " ".join(options)
    if chinese:
        asked = f"问题：{question} 选项：{shown}\n答案：从A到{last}, 我们应选择"
    else:
        asked = f"Q: {question} Answer Choices: {shown}\nA: Among A through {last}, the answer is"
    label = row.get("label")
    key = [c for c in ("".join(label) if isinstance(label, list) else str(label or "")) if not c.isspace()]
    if not key or any(c not in LETTERS[: len(options)] for c in key):
        return None  # the hub's copies leave these out too: one row of each JEC-QA task
    return {"query": passage + asked, "choices": options, "gold": [LETTERS.index(c) for c in key]}


def _text(row: Row, name: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        return value
    raise _misfit(row, name, where, "text")


def _texts(row: Row, name: str, where: str) -> list[str]:
    value = row.get(name)
    if isinstance(value, list) and 2 <= len(value) <= len(LETTERS) and all(isinstance(text, str) for text in value):
        return value
    raise _misfit(row, name, where, f"a list of 2 to {len(LETTERS)} texts")


def _misfit(row: Row, name: str, where: str, kind: str) -> TellError:
    what = f"{name} is not {kind}" if name in row else f"has no column {name}"
    return TellError(what, where=where, remedy=f"Columns of this row: {', '.join(row) or 'none'}.")
