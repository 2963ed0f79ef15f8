"""Answers side by side: which test rows are shown, and how the arms did on each."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from tell.report.glossary import term
from tell.report.html_text import is_number, shorten, word_diff
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
    against: list[tuple[str, int, int, int]]
    rows: int
    binary: bool


def build_cases(run: Run) -> Cases | None:
    """Choose test rows: the first on which the arms disagree, and failures of tell."""
    if not run.predictions:
        return None
    arms = list(run.predictions)
    focus = "tell" if "tell" in arms else arms[-1]
    keyed = {arm: _keyed(rows) for arm, rows in run.predictions.items()}
    keys = list(keyed[focus])
    primary = primary_metric(run.metrics) or next((m for row in keyed[focus].values() for m in _scores(row)), None)
    outcome = {a: np.array([_outcome(keyed[a].get(k), primary) for k in keys], dtype=float) for a in arms}
    known = np.concatenate(list(outcome.values()))
    known = known[np.isfinite(known)]
    binary = bool(len(known)) and bool(np.isin(known, (0.0, 1.0)).all())
    higher = term(primary).higher if primary else True
    own = outcome[focus] if higher else -outcome[focus]
    stacked = np.stack([outcome[a] for a in arms])
    spread = np.array([len({v for v in column if np.isfinite(v)}) > 1 for column in stacked.T], dtype=bool)
    if binary:
        fails = outcome[focus] < 1
    else:
        finite = own[np.isfinite(own)]
        fails = own <= (np.quantile(finite, 0.2) if len(finite) else -np.inf)
    others = [a for a in arms if a not in (focus, "tell-anchor")]
    alone = np.ones(len(keys), dtype=bool) if others else np.zeros(len(keys), dtype=bool)
    for arm in others:
        alone &= own > (outcome[arm] if higher else -outcome[arm])
    chosen = set(np.flatnonzero(spread)[:DISAGREEMENTS]) | set(np.flatnonzero(fails)[:FAILURES])
    for i in range(len(keys)):
        if len(chosen) >= min(LEAST, len(keys)):
            break
        chosen.add(i)
    names = [("differ", "Arms differ", spread), ("fails", f"{focus} {'fails' if binary else 'does worst'}", fails)]
    names.append(("alone", f"Only {focus} {'succeeds' if binary else 'does best'}", alone))
    cases = []
    for i in sorted(int(c) for c in chosen):
        case = _case(i, keys[i], keyed, [focus, *(a for a in arms if a != focus)], primary)
        case.tags = [tag for tag, _, mask in names if mask[i]]
        cases.append(case)
    filters = [("all", "All shown", len(cases))]
    filters += [(tag, label, sum(tag in c.tags for c in cases)) for tag, label, _ in names]
    against = []
    for arm in arms:
        if arm != focus:
            other = outcome[arm] if higher else -outcome[arm]
            both = np.isfinite(own) & np.isfinite(other)
            ours, theirs = own[both], other[both]
            against.append((arm, int((ours > theirs).sum()), int((ours == theirs).sum()), int((ours < theirs).sum())))
    return Cases(focus, cases, filters, _figure(outcome, arms, primary), against, len(keys), binary)


def prompt_text(prompt: Any) -> str:
    """A prompt as text, whether it was kept as one or as a list of turns."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        turns = [m for m in prompt if isinstance(m, dict)]
        return "\n\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in turns)
    return "" if prompt is None else json.dumps(prompt, ensure_ascii=False)


def _figure(outcome: dict[str, np.ndarray], arms: list[str], primary: str | None) -> Markup | None:
    """Outcomes of every test row, rows that most arms get right first; only for scores between 0 and 1."""
    stacked = np.stack([outcome[a] for a in arms])
    known = stacked[np.isfinite(stacked)]
    if not len(known) or known.min() < 0 or known.max() > 1:
        return None
    order = np.argsort(-np.nan_to_num(stacked).sum(axis=0), kind="stable")
    title = f"{term(primary).label if primary else 'Score'} of every test row, for each arm"
    return outcome_figure({a: outcome[a][order] for a in arms}, {}, title)


def _keyed(rows: list[dict]) -> dict[tuple[str, int], dict]:
    """Rows by content hash and how often that hash came before, so that equal test rows stay apart."""
    seen: Counter[str] = Counter()
    out = {}
    for i, row in enumerate(rows):
        name = str(row.get("hash", i))
        out[(name, seen[name])] = row
        seen[name] += 1
    return out


def _scores(row: dict) -> dict[str, Any]:
    return mapping(row, "scores")


def _outcome(row: dict | None, metric: str | None) -> float:
    value = _scores(row).get(metric) if row is not None and metric is not None else None
    return float(value) if is_number(value) or isinstance(value, bool) else float("nan")


def _case(i: int, key: tuple[str, int], keyed: dict, arms: list[str], primary: str | None) -> Case:
    first = next(keyed[a][key] for a in arms if key in keyed[a])
    reference = prompt_text(first.get("reference"))
    answers = []
    for arm in arms:
        row = keyed[arm].get(key)
        if row is None:
            continue
        text = prompt_text(row.get("answer"))
        outcome = _outcome(row, primary)
        names = sorted(_scores(row), key=lambda m: m != primary)
        scores = [(term(m).label, _scores(row)[m], term(m).unit) for m in names]
        note = "cut off at the length limit" if row.get("finish") == "length" else ""
        marked = word_diff(reference, text) if len(text) <= LONG and text != reference else None
        answers.append(
            Answer(
                arm=arm,
                text=shorten(text, LONG),
                marked=marked,
                scores=[
                    (label, float(v) if is_number(v) or isinstance(v, bool) else None, u) for label, v, u in scores
                ],
                outcome=outcome if np.isfinite(outcome) else None,
                why=prompt_text(row.get("why")),
                note=note or ("equals the reference" if text == reference else ""),
            )
        )
    return Case(
        i + 1,
        str(first.get("origin", "")),
        shorten(prompt_text(first.get("prompt")), LONG),
        shorten(reference, LONG),
        answers,
    )
