"""Answers side by side: the test rows to show, and how the arms did on each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from markupsafe import Markup

from tell.metric_names import metric
from tell.names import arm
from tell.number_text import is_number
from tell.report.arm_rows import keyed
from tell.report.html_text import shorten, word_diff
from tell.report.read_run import Run, mapping
from tell.report.score_tables import primary_metric
from tell.report.svg import outcome_figure

DISAGREEMENTS, FAILURES, LEAST = 12, 8, 6
LONG = 4000
"""Characters of a prompt or an answer that are shown."""


@dataclass
class Answer:
    """One arm's answer to one test row, ready to print."""

    arm: str
    text: str
    marked: Markup | None
    scores: list[tuple[str, float | None, str]]
    outcome: float | None
    why: str = ""
    note: str = ""


@dataclass
class Case:
    """One test row: ``number`` counts from 1 in test order; ``tags`` drive the filter."""

    number: int
    origin: str
    prompt: str
    reference: str
    answers: list[Answer]
    tags: list[str] = field(default_factory=list)


@dataclass
class Cases:
    """The section: cases, the filter's choices (tag, label, count), the figure and the counts per arm."""

    focus: str
    cases: list[Case]
    filters: list[tuple[str, str, int]]
    figure: Markup | None
    against: list[tuple[str, list[int]]]
    rows: int
    binary: bool


def build_cases(run: Run) -> Cases | None:
    """Choose test rows: the first on which the arms disagree, and failures of tell."""
    if not run.predictions:
        return None
    arms = list(run.predictions)
    focus = "tell" if "tell" in arms else arms[-1]
    rows_of = {name: keyed(rows) for name, rows in run.predictions.items()}
    keys = list(rows_of[focus])
    primary = primary_metric(run.metrics) or next(
        (m for row in rows_of[focus].values() for m in mapping(row, "scores")), ""
    )
    scores = np.array([[_outcome(rows_of[name].get(key), primary) for key in keys] for name in arms], dtype=float)
    known = scores[np.isfinite(scores)]
    binary = bool(len(known)) and bool(np.isin(known, (0.0, 1.0)).all())
    signed = dict(zip(arms, scores if metric(primary).higher_is_better else -scores, strict=True))  # more is better
    own = signed[focus]
    differ = np.array([len(set(column[np.isfinite(column)])) > 1 for column in scores.T], dtype=bool)
    finite = own[np.isfinite(own)]
    fails = own < 1 if binary else own <= (np.quantile(finite, 0.2) if len(finite) else -np.inf)
    others = [name for name in arms if name != focus and arm(name).adapter != focus]
    alone = (
        np.logical_and.reduce([own > signed[name] for name in others]) if others else np.zeros(len(keys), dtype=bool)
    )
    filters = (
        ("differ", "Arms differ", differ),
        ("fails", f"{focus} {'fails' if binary else 'does worst'}", fails),
        ("alone", f"Only {focus} {'succeeds' if binary else 'does best'}", alone),
    )
    order = [focus, *(name for name in arms if name != focus)]
    cases = []
    for i in _chosen(differ, fails):
        case = _case(i, {name: rows_of[name].get(keys[i]) for name in order}, primary)
        case.tags = [tag for tag, _, mask in filters if mask[i]]
        cases.append(case)
    counts = [("all", "All shown", len(cases))]
    counts += [(tag, label, sum(tag in case.tags for case in cases)) for tag, label, _ in filters]
    against = []
    for name in order[1:]:
        both = np.isfinite(own) & np.isfinite(signed[name])
        signs = np.sign(own[both] - signed[name][both])
        against.append((name, [int((signs == sign).sum()) for sign in (1, 0, -1)]))
    figure = _figure(dict(zip(arms, scores, strict=True)), primary)
    return Cases(focus, cases, counts, figure, against, len(keys), binary)


def _chosen(differ: np.ndarray, fails: np.ndarray) -> list[int]:
    """Rows to show, in test order: some of each, and further ones up to `LEAST`."""
    chosen = {*np.flatnonzero(differ)[:DISAGREEMENTS].tolist(), *np.flatnonzero(fails)[:FAILURES].tolist()}
    rest = (i for i in range(len(differ)) if i not in chosen)
    return sorted([*chosen, *islice(rest, max(0, LEAST - len(chosen)))])


def prompt_text(prompt: object) -> str:
    """A prompt as text, from text or a list of turns."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        turns = [turn for turn in prompt if isinstance(turn, dict)]
        return "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)
    return "" if prompt is None else json.dumps(prompt, ensure_ascii=False)


def _figure(scores: dict[str, np.ndarray], primary: str) -> Markup | None:
    """Scores of every test row, rows that most arms get right first; only for scores between 0 and 1."""
    stacked = np.stack(list(scores.values()))
    known = stacked[np.isfinite(stacked)]
    if not len(known) or known.min() < 0 or known.max() > 1:
        return None
    order = np.argsort(-np.nan_to_num(stacked).sum(axis=0), kind="stable")
    title = f"{metric(primary).label if primary else 'Score'} of every test row, for each arm"
    return outcome_figure({name: values[order] for name, values in scores.items()}, title)


def _number(value: object) -> float | None:
    """A score as a number; true and false are 1 and 0."""
    return float(value) if is_number(value) or isinstance(value, bool) else None


def _outcome(row: dict | None, metric: str) -> float:
    value = _number(mapping(row, "scores").get(metric))
    return float("nan") if value is None else value


def _case(i: int, rows: dict[str, dict | None], primary: str) -> Case:
    """The case of one test row from each arm's prediction, that of the focus first."""
    there = {name: row for name, row in rows.items() if row is not None}
    first = next(iter(there.values()))
    reference = prompt_text(first.get("reference"))
    case = Case(
        i + 1,
        str(first.get("origin", "")),
        shorten(prompt_text(first.get("prompt")), LONG),
        shorten(reference, LONG),
        [],
    )
    for name, row in there.items():
        text, scores = prompt_text(row.get("answer")), mapping(row, "scores")
        cut = "cut off at the length limit" if row.get("finish") == "length" else ""
        specs = [metric(m) for m in sorted(scores, key=lambda m: m != primary)]
        case.answers.append(
            Answer(
                arm=name,
                text=shorten(text, LONG),
                marked=word_diff(reference, text) if len(text) <= LONG and text != reference else None,
                scores=[(spec.label, _number(scores[spec.name]), spec.unit) for spec in specs],
                outcome=_number(scores.get(primary)),
                why=prompt_text(row.get("why")),
                note=cut or ("equals the reference" if text == reference else ""),
            )
        )
    return case
