"""Benchmarks of general ability: their tasks in lm-evaluation-harness, local files for them, and means over tasks.

The harness reads the hub's copies of AGIEval (``hails/agieval-*``), whose ``query`` is AGIEval's own zero-shot prompt;
the files of the AGIEval repository hold its parts, and are put together here in the same way. A test compares sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
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
    "aqua_rat",
    "gaokao_english",
    "logiqa_en",
    "lsat_ar",
    "lsat_lr",
    "lsat_rc",
    "math",
    "sat_en_without_passage",
    "sat_en",
    "sat_math",
)
AGIEVAL_CN = (
    "gaokao_biology",
    "gaokao_chemistry",
    "gaokao_chinese",
    "gaokao_geography",
    "gaokao_history",
    "gaokao_mathcloze",
    "gaokao_mathqa",
    "gaokao_physics",
    "jec_qa_ca",
    "jec_qa_kd",
    "logiqa_zh",
)
PREFIX = "agieval_"
GROUPS: dict[str, tuple[str, ...]] = {
    "agieval": tuple(PREFIX + name for name in (*AGIEVAL_CN, *AGIEVAL_EN)),
    "agieval_en": tuple(PREFIX + name for name in AGIEVAL_EN),
    "agieval_cn": tuple(PREFIX + name for name in AGIEVAL_CN),
}
SHOTS = {"gsm8k": 5, "openbookqa": 0}  # the harness's own; only these have training rows to show examples of
CLOZE = ("agieval_math", "agieval_gaokao_mathcloze")
LETTERS = "ABCDEFG"


@dataclass(frozen=True)
class LocalTask:
    """One task's rows from files, in the columns the harness expects.

    Attributes:
        test: rows to answer.
        train: rows to show as examples; empty where none are shown.
        digest: 16 hexadecimal digits over the files.
        dropped: rows left out for want of a usable answer key.
    """

    test: list[Row]
    train: list[Row]
    digest: str
    dropped: int


def benchmark_tasks(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Tasks of the harness under each benchmark asked for: itself, or those of a group of AGIEval.

    Raises:
        TellError: an unknown name, with the nearest.
    """
    known = [*SHOTS, *GROUPS, *GROUPS["agieval"]]
    out: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name not in known:
            raise TellError(
                f"unknown benchmark {name!r}",
                where="benchmarks",
                nearest=did_you_mean(name, known),
                remedy=f"Use {', '.join([*SHOTS, *GROUPS])}, or one task of AGIEval, e.g. agieval_sat_math.",
            )
        out[name] = GROUPS.get(name, (name,))
    return out


def task_shots(task: str, shots: int | None) -> int:
    """Examples shown before each question: ``shots``, or the harness's own number; none where there are none to show.

    AGIEval has test rows only: the harness would show other test rows, perhaps the question itself.
    """
    return 0 if task not in SHOTS else SHOTS[task] if shots is None else shots


def local_files(task: str, folder: str | Path) -> dict[str, Path]:
    """Files of a task by part: ``test`` and, where there is one, ``train``; without ``test`` there are none.

    ``gsm8k_test.jsonl.gz``, ``openbookqa_train.jsonl``, ``agieval/lsat-ar.jsonl``: any format TELL reads.

    Raises:
        TellError: ``folder`` is no folder.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise TellError("no such folder", where=str(folder), remedy="Give the folder that holds the benchmarks' files.")
    if task in SHOTS:
        stems = {"test": root / f"{task}_test", "train": root / f"{task}_train"}
    else:
        stems = {"test": root / "agieval" / task.removeprefix(PREFIX).replace("_", "-")}
    found = {}
    for part, stem in stems.items():
        matches = sorted(p for p in stem.parent.glob(f"{stem.name}.*") if format_of(p))
        if matches:
            found[part] = matches[0]
    return found if "test" in found else {}


def local_tasks(groups: dict[str, tuple[str, ...]], folder: str | Path) -> dict[str, tuple[str, ...]]:
    """``groups`` as far as there are files for them.

    Raises:
        TellError: a benchmark without any file.
    """
    out = {}
    for name, tasks in groups.items():
        out[name] = tuple(task for task in tasks if local_files(task, folder))
        if not out[name]:
            stem = f"agieval/{tasks[0].removeprefix(PREFIX).replace('_', '-')}" if name not in SHOTS else f"{name}_test"
            raise TellError(
                f"holds no file for {name}",
                where=str(folder),
                remedy=f"Put e.g. {stem}.jsonl there, or leave {name} out.",
            )
    return out


def read_task(task: str, folder: str | Path, *, shots: int) -> LocalTask:
    """Rows of one task, as the harness's own dataset has them.

    Args:
        shots: examples shown before each question; with 0 the training file is not looked at.

    Raises:
        TellError: no file, a column that is missing, or fewer training rows than examples.
    """
    found = local_files(task, folder)
    stem = f"{task}_train" if task in SHOTS else task
    if "test" not in found:
        raise TellError(f"holds no file for {task}", where=str(folder), remedy="Check --benchmark-data.")
    if shots and "train" not in found:
        check_file(Path(folder) / f"{stem}.jsonl", remedy="Put it there, or use --benchmark-shots 0.")
    parts = {part: path for part, path in found.items() if part == "test" or shots}
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in parts.values()))
    rows, dropped = {}, 0
    for part, path in parts.items():
        read = [_converted(task, row, f"{path}:{number}") for number, row in read_records(path)]
        rows[part] = [row for row in read if row is not None]
        dropped += len(read) - len(rows[part])
        if not rows[part] or (part == "train" and len(rows[part]) < shots):
            raise TellError(
                f"has {len(rows[part])} usable rows", where=str(path), remedy="Give the benchmark's whole file."
            )
    return LocalTask(rows["test"], rows.get("train", []), digest.hexdigest()[:16], dropped)


def group_mean(tasks: Sequence[Metric]) -> Metric:
    """The arithmetic mean of tasks' means, each weighing the same however many rows it has (paper, A.5).

    Intervals come from resampling rows of all tasks together; a task that a resample left out does not count in it.
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
    """A row in the hub's columns; None where its answer key is unusable."""
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
        raise TellError(f"the answer {key!r} is none of {', '.join(labels)}", where=where, remedy="Mend that row.")
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
    return _column(row, name, where, lambda value: isinstance(value, str) and bool(value.strip()), "text")


def _texts(row: Row, name: str, where: str) -> list[str]:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and 2 <= len(value) <= len(LETTERS) and all(isinstance(x, str) for x in value)

    return _column(row, name, where, fits, f"a list of 2 to {len(LETTERS)} texts")


def _column(row: Row, name: str, where: str, fits: Callable[[Any], bool], kind: str) -> Any:
    if not fits(row.get(name)):
        what = f"{name} is not {kind}" if name in row else f"has no column {name}"
        raise TellError(what, where=where, remedy=f"Columns of this row: {', '.join(row) or 'none'}.")
    return row[name]
