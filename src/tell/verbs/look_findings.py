"""Findings of `tell look` that need no model: balance, contradictions, near-duplicates, what test rows can show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tell.data.closed import ClosedField, closed_fields
from tell.data.example import Example
from tell.data.json_text import nfc, parse_strict
from tell.data.kind import Kind
from tell.data.overlap import Overlap, find_duplicates
from tell.data.split import prompt_groups
from tell.metric_names import metric
from tell.number_text import as_typed, show
from tell.run.task_rows import DataFacts, overlap_facts
from tell.score.intervals import estimate, is_gain, wilson
from tell.score.label_table import best_constant, label_scorer
from tell.shown import brief, shorten

LISTED = 50  # rows listed of each finding; the counts cover all of them
NAMED = 3  # rows named in a sentence
QUOTED = 300  # characters of a prompt or an answer in a finding
MOST_VALUES = 200  # values of a field that are listed
COMPARED = 10_000  # rows compared with each other for near-duplicates
MANY = 1000  # test rows from which shares have a decimal
GOOD = 0.9  # a score whose interval is told


def listed(rows: Iterable[dict]) -> dict:
    """``{"total", "rows"}``: the first rows of a finding, and how many there are."""
    every = list(rows)
    return {"total": len(every), "rows": every[:LISTED]}


def balance(kind: Kind, parts: Mapping[str, Sequence[Example]], *, seed: int, samples: int) -> list[dict]:
    """``fields``: each closed field with the counts of its values in each part, and the best constant answer.

    Args:
        parts: rows of ``train``, ``validation`` and ``test``.
        seed, samples: of the bootstrap.
    """
    fields = closed_fields(kind, parts["train"])
    if not fields and kind.name == "label" and kind.labels:  # all training rows have one label
        fields = [ClosedField((), "value", kind.labels)]
    answers = [example.answer for example in parts["test"]]
    draws = {"seed": seed, "samples": samples}
    return [{**_balance(one, parts), "constant": _constant(kind, one, answers, draws)} for one in fields]


def _balance(one: ClosedField, parts: Mapping[str, Sequence[Example]]) -> dict:
    counts: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for name, part in parts.items():
        counts[name], sizes[name] = _counts(one, [example.answer for example in part])
    names = [*one.values, "(other)"][: one.classes]
    order = np.argsort(-np.sum(list(counts.values()), axis=0), kind="stable").tolist()
    values = [{"value": names[c], **{name: int(count[c]) for name, count in counts.items()}} for c in order]
    return {
        "field": one.name,
        "rows": sizes,
        "values": values[:MOST_VALUES],
        "more_values": len(values[MOST_VALUES:]),
    }


def _counts(one: ClosedField, answers: Sequence[str]) -> tuple[np.ndarray, int]:
    """(classes,) how often each value occurs, and how many answers have one."""
    targets = [target for answer in answers if (target := one.target(answer)) is not None]
    return np.sum(targets, axis=0) if targets else np.zeros(one.classes), len(targets)


def _constant(kind: Kind, one: ClosedField, answers: Sequence[str], draws: Mapping[str, int]) -> dict | None:
    """The best of all constant answers to the test rows, so that no lucky one is above it; None for a list in a JSON.

    Of labels it is the baseline of a run's report. Its score is a share of all test rows, also of those whose value
    is in no training row; ``right`` is None where the metric counts no rows.
    """
    n = len(answers)
    if not n or (one.is_set and one.path):
        return None
    if not one.path and (scorer := label_scorer(kind)) is not None:
        value, scores = best_constant(kind, scorer, answers)
        score = scores[scorer.primary]
        if not score.binary:
            found = estimate(score, **draws)
            about = {"metric": scorer.primary, "right": None, "n": n}
            return {"value": value, **about, "share": found["value"], "ci": found["ci"]}
        name, right = scorer.primary, int(score.per_row.sum())
    else:
        counts, _ = _counts(one, answers)
        best = int(np.argmax(counts[: len(one.values)]))
        value, right, name = one.values[best], int(counts[best]), "accuracy"
    return {"value": value, "metric": name, "right": right, "n": n, "share": right / n, "ci": list(wilson(right, n))}


def row_findings(rows: Sequence[Example], facts: DataFacts) -> dict:
    """``findings``: rows that contradict, repeat or leak, or were left out.

    Args:
        rows: all rows of the task's files.
        facts: of the same rows, split.
    """
    compared = rows[:COMPARED]
    pairs = find_duplicates(compared)
    near = overlap_facts(Overlap(near=len(pairs), pairs=pairs), compared, compared)
    for shown, pair in zip(near["pairs"], pairs, strict=False):
        shown["other_answer"] = _meaning(rows[pair.a_index].answer) != _meaning(rows[pair.test_index].answer)
    return {
        "contradictions": listed(_contradictions(rows)),
        "repeated": len(rows) - len({example.hash for example in rows}),
        "near_duplicates": near | {"compared": len(compared)},
        "leaks": facts.overlap | {"dropped": facts.overlap_dropped},
        "left_out": listed(facts.dropped_rows),
        "empty_answers": listed(row for row in facts.dropped_rows if row["reason"].startswith("has no answer")),
    }


def _contradictions(rows: Sequence[Example]) -> list[dict]:
    """Prompts with more than one answer, and the rows of each answer."""
    found = []
    for group in prompt_groups(rows):
        answers: dict[str, list[Example]] = {}
        for i in group if len(group) > 1 else ():
            answers.setdefault(_meaning(rows[i].answer), []).append(rows[i])
        if len(answers) > 1:
            said = [
                {"answer": shorten(same[0].answer, QUOTED), "rows": [example.origin for example in same[:LISTED]]}
                for same in answers.values()
            ]
            found.append({"prompt": shorten(rows[group[0]].question, QUOTED), "answers": said[:LISTED]})
    return found


def _meaning(answer: str) -> str:
    """An answer for comparing: JSON by its value, text without white space at its ends."""
    try:
        return json.dumps(nfc(parse_strict(answer)), sort_keys=True)
    except ValueError:
        return nfc(answer.strip())


def intervals(n: int, fields: Sequence[dict]) -> list[dict]:
    """``intervals``: what n test rows can show of a score of 90 %, and of scores above a label's constant baseline.

    Gains are counted as if no row were lost, so they are the least.
    """
    right = round(GOOD * n)
    low, high = wilson(right, n)
    gain = next((k for k in range(1, right + 1) if is_gain(right - k, right, n)), None)
    digits = int(n >= MANY)
    least = f"a gain below {100 * gain / n:.{digits}f} points cannot be seen" if gain else "no gain can be seen"
    words = f"with {_rows(n)} a score of 90 % has an interval of {_range(low, high, digits)}: {least}"
    found = [{"score": GOOD, "n": n, "ci": [low, high], "gain_rows": gain, "words": words}]
    constant = fields[0]["constant"] if len(fields) == 1 else None
    if constant:
        right, (low, high), gain = constant["right"], constant["ci"], None
        words = (
            f"with {_rows(n)} the constant baseline, {_percent(constant['share'], digits)}, has an interval of "
            f"{_range(low, high, digits)}"
        )
        if right is not None:
            gain = next((k for k in range(1, n - right + 1) if is_gain(right, right + k, n)), None)
            more = " or more" if gain and right + gain < n else ""
            least = f"only a score of {_percent((right + gain) / n, digits)}{more} is" if gain else "no score can be"
            words += f": {least} seen to be better"
        found.append({"score": constant["share"], "n": n, "ci": [low, high], "gain_rows": gain, "words": words})
    return found


def _rows(n: int) -> str:
    return f"{n:,} test row{'s' if n > 1 else ''}"


def _range(low: float, high: float, digits: int) -> str:
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f} %"


def _percent(share: float, digits: int = 0) -> str:
    return as_typed(show(share, "share", digits=digits, exact=True))


def constant_words(one: Mapping) -> str | None:
    """``answering billing to everything gives 81 %``, of an entry of ``fields``; None without a constant baseline."""
    constant = one["constant"]
    if constant is None:
        return None
    score = "" if constant["right"] is not None else f"a {metric(constant['metric']).phrase} of "
    text = f"answering {brief(constant['value'])} to everything gives {score}{_percent(constant['share'])}"
    return (
        text if one["field"] in ("label", "labels[]") else f"field {brief(one['field'].removesuffix(' empty'))}: {text}"
    )


def checks(found: Mapping) -> list[dict]:
    """``checks`` from the other facts: what to look at, the gravest first.

    Returns:
        ``{"level", "text"}`` each; the level is ``refused`` (`tell tune` stops there), ``warning`` or ``note``.
    """
    rows, lengths = found["findings"], found["lengths"]
    refused = list(found["refused"])
    warnings = [f"no row is rendered and no token counted: {text}" for text in [found["model"]["absent"]] if text]
    warnings += _counted("rows without an answer, left out", rows["empty_answers"])
    if (total := rows["left_out"]["total"]) > rows["empty_answers"]["total"]:
        warnings += _counted("rows left out", rows["left_out"])
    if total := rows["contradictions"]["total"]:
        answers = rows["contradictions"]["rows"][0]["answers"]
        where = _names([answer["rows"][0] for answer in answers], len(answers))
        warnings.append(f"prompts with more than one answer: {total:,}; the first is in {where}")
    if total := rows["leaks"]["exact"] + rows["leaks"]["near"]:
        remedy = "they are removed" if rows["leaks"]["dropped"] else "--drop-overlap removes them"
        warnings.append(f"training rows that equal or nearly equal a test row: {total:,}; {remedy}")
    if lengths:
        warnings += _counted(f"training rows over train.max_length, {lengths['limit']:,} tokens", lengths["over"])
    notes: list[str] = []
    if total := rows["near_duplicates"]["near"]:
        pairs = [pair for pair in rows["near_duplicates"]["pairs"] if pair["other_answer"]]
        where = f"; with another answer: {pairs[0]['a']} and {pairs[0]['b']}, for one" if pairs else ""
        (warnings if pairs else notes).append(f"rows that nearly equal an earlier row: {total:,}{where}")
    if total := rows["repeated"]:
        notes.append(f"rows that repeat an earlier row in full: {total:,}")
    notes += [text for one in found["fields"] if (text := constant_words(one))]
    notes += [entry["words"] for entry in found["intervals"]]
    every = {"refused": refused, "warning": warnings, "note": notes}
    return [{"level": level, "text": text} for level, texts in every.items() for text in texts]


def _counted(what: str, found: Mapping) -> list[str]:
    total = found["total"]
    return [f"{what}: {total:,} ({_names([row['origin'] for row in found['rows']], total)})"] if total else []


def _names(origins: Sequence[str], total: int) -> str:
    """``tickets.csv:3, tickets.csv:9 and 4 more``"""
    named = ", ".join(origins[:NAMED])
    return f"{named} and {total - NAMED:,} more" if total > NAMED else named
