"""`tell gate`: whether a run is good enough, by the ends of its intervals. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from tell.errors import TellError, did_you_mean
from tell.files import write_text
from tell.folder import RunFolder, reading
from tell.metric_names import MetricSpec, metric
from tell.number_text import as_typed, has_interval, is_number, show, show_interval
from tell.report.arm_rows import ArmRows, agrees, arm_rows
from tell.report.read_run import Run, mapping, read_run
from tell.report.score_tables import primary_metric
from tell.score.decide import IntervalOf, decide, paired_interval, rows_needed, scaled_interval, share_interval
from tell.score.intervals import wilson
from tell.shown import one_line

CODES = {True: 0, False: 1, None: 3}
"""Exit code of each outcome: passed, failed, cannot tell."""
WORDS = {True: "passed", False: "failed", None: "cannot tell"}


@dataclass(frozen=True)
class Limit:
    """A metric of the run must be at least ``value``, or at most where lower is better."""

    metric: str
    value: float


@dataclass(frozen=True)
class NotWorse:
    """The run's primary metric must be above that of an older run minus ``margin``, in the metric's own values."""

    run: str
    margin: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What one condition came to.

    Attributes:
        passed: None where the rows cannot tell.
        value, ci, n: of the metric, or of the paired difference to the older run.
        rows_needed: test rows that would decide it if the estimate stays as it is; None where none would.
        text: a sentence with the numbers.
    """

    condition: str
    metric: str
    limit: float
    value: float
    ci: tuple[float, float]
    n: int
    passed: bool | None
    rows_needed: int | None
    text: str


def gate(
    run: str | Path, conditions: Sequence[Limit | NotWorse], *, arm: str = "tell", junit: str | Path | None = None
) -> dict:
    """Whether an arm of a run meets every condition, each judged by the end of a 95 % interval.

    Args:
        run: a finished run folder.
        conditions: at least one.
        arm: the arm that is judged, in both runs.
        junit: file for the outcomes as JUnit XML, one test case per condition; what cannot be told is an error.

    Returns:
        ``run``, ``arm``, ``passed`` (None: no condition failed, but one cannot be told), ``exit_code`` (0, 1 or 3) and
        ``conditions``, as `Outcome`.

    Raises:
        TellError: no condition, no such run, arm or metric; runs without a common test row.
    """
    if not conditions:
        remedy = "Add --min METRIC=VALUE or --not-worse-than RUN[:MARGIN]."
        raise TellError("no condition is given", where="tell gate", remedy=remedy)
    new = _scored(run, arm)
    outcomes = [_limit(new, arm, c) if isinstance(c, Limit) else _not_worse(new, arm, c) for c in conditions]
    all_of = {outcome.passed for outcome in outcomes}
    passed = False if False in all_of else None if None in all_of else True
    if junit is not None:
        write_text(Path(junit), junit_xml(str(run), outcomes))
    found = [asdict(outcome) for outcome in outcomes]
    return {"run": str(run), "arm": arm, "passed": passed, "exit_code": CODES[passed], "conditions": found}


def _scored(root: str | Path, arm: str) -> Run:
    """A run in which the arm was scored."""
    folder = RunFolder(root)
    run = read_run(folder)
    with reading(folder.root):
        folder.read(folder.metrics)  # missing or damaged is an error here, not an empty page
        arms = mapping(run.metrics, "arms")
        if not mapping(arms, arm):
            scored = f"It scored {', '.join(arms)}." if arms else "It scored no arm."
            raise TellError(f"has no scores of the arm {arm}", where=str(root), remedy=f"{scored} Name one with --arm.")
    return run


def _entry(run: Run, arm: str, name: str, where: str) -> tuple[float, float, float, int]:
    """Value, both limits and n of a metric."""
    entries = mapping(run.metrics, "arms", arm)
    if name not in entries:
        remedy, nearest = f"The metrics of {arm} are {', '.join(entries)}.", did_you_mean(name, entries)
        raise TellError(f"{run.folder.root} has no metric {name!r}", where=where, remedy=remedy, nearest=nearest)
    entry = mapping(entries, name)
    value, ci, n = entry.get("value"), entry.get("ci"), entry.get("n")
    if not is_number(value) or not has_interval(ci) or not isinstance(n, int) or n < 1:
        remedy = "Gate another metric, or score test rows that it applies to."
        raise TellError(f"{name} of {arm} has no value and interval in {run.folder.root}", where=where, remedy=remedy)
    return float(value), float(ci[0]), float(ci[1]), n


def _limit(run: Run, arm: str, condition: Limit) -> Outcome:
    name, limit, spec = condition.metric, condition.value, metric(condition.metric)
    where = f"--min {name}={limit:g}"
    value, low, high, n = _entry(run, arm, name, where)
    if spec.unit == "share" and not 0 <= limit <= 1:
        remedy = f"Write a share, e.g. {name}={limit / 100:g} for {limit:g} %." if 1 < limit <= 100 else ""
        raise TellError(f"{name} is between 0 and 1", where=where, remedy=remedy or "Write a share of 0 to 1.")
    is_share = spec.unit == "share" and all(map(agrees, wilson(value * n, n), (low, high)))
    interval = share_interval(value) if is_share else scaled_interval(value, low, high, n)
    sign = 1 if spec.higher_is_better else -1
    passed, needed = _judge(interval, sign, limit, (low, high))
    sign_text = ">=" if sign > 0 else "<="
    numbers = f"{_shown(value, spec)}, 95 % interval {_interval((low, high), spec)}, {_rows(n)}"
    text = f"{spec.phrase} of {arm} is {numbers}; the limit is {_shown(limit, spec)}{_advice(passed, needed)}"
    return Outcome(f"{name} {sign_text} {limit:g}", name, limit, value, (low, high), n, passed, needed, text)


def _not_worse(run: Run, arm: str, condition: NotWorse) -> Outcome:
    where = f"--not-worse-than {condition.run}"
    old, name = _scored(condition.run, arm), primary_metric(run.metrics) or ""
    for each in (run, old):
        _entry(each, arm, name, where)
    a, b = _rows_of(run, arm, name, where), _rows_of(old, arm, name, where)
    keys = a.shared(b)
    if not keys:
        raise TellError(
            f"{run.folder.root} and {condition.run} have no test row in common, so they cannot be paired",
            where=where,
            remedy=f"Score both on the same rows: `tell eval` with --test, or make the new run with `tell add "
            f"{condition.run} FILE`.",
        )
    spec = metric(name)
    gap = a.minus(b, name, keys)
    if not has_interval(gap["ci"]) or not is_number(gap["value"]):
        raise TellError(f"{name} applies to none of the {len(keys)} shared test rows", where=where, remedy="")
    sign = 1 if spec.higher_is_better else -1
    limit = -condition.margin * sign
    interval = paired_interval(a.over(name, keys), b.over(name, keys), gap)
    passed, needed = _judge(interval, sign, limit, gap["ci"])
    value, (low, high), n = gap["value"], gap["ci"], gap["n"]
    margin = max(0.0, -low if sign > 0 else high)
    at_hand = f"; these rows can show that it is not worse by more than {margin:.3g}" if passed is None else ""
    part = "" if len(keys) == len(a.rows) == len(b.rows) else f" of {len(a.rows):,} and {len(b.rows):,}"
    shown = f"{as_typed(show(value, spec.gap_unit, sign=True))}, 95 % interval {_interval((low, high), spec)}"
    text = (
        f"{spec.phrase} of {arm} minus that of {condition.run}: {shown}, {_rows(n)} in common{part}; "
        f"the margin is {condition.margin:g}{at_hand}{_advice(passed, needed)}"
    )
    title = f"{name} not worse than {condition.run} by {condition.margin:g}"
    return Outcome(title, name, limit, value, (low, high), n, passed, needed, text)


def _rows_of(run: Run, arm: str, name: str, where: str) -> ArmRows:
    found = arm_rows(run, arm)
    if name not in found.metrics:
        remedy = "Copy the run's predictions/ too, and name a run whose scores can be had from its answers."
        what = f"{run.folder.root} keeps no answers of {arm} that give its {name} row by row"
        raise TellError(what, where=where, remedy=remedy)
    return found


def _judge(interval: IntervalOf, sign: int, limit: float, ci: tuple[float, float]) -> tuple[bool | None, int | None]:
    """The outcome, and the rows that would decide it where these cannot; ``sign`` -1: lower is better."""

    def up(limits: tuple[float, float]) -> tuple[float, float]:
        return limits if sign > 0 else (-limits[1], -limits[0])

    passed = decide(*up(ci), sign * limit)
    return passed, rows_needed(lambda n: up(interval(n)), sign * limit) if passed is None else None


def _advice(passed: bool | None, needed: int | None) -> str:
    if passed is not None:
        return ""
    if needed is None:
        return "; no number of rows decides it, the estimate being at the limit"
    return f"; about {needed:,} test rows would decide it if the estimate stays"


def _shown(value: float, spec: MetricSpec) -> str:
    return as_typed(show(value, spec.unit, exact=True))


def _interval(ci: tuple[float, float], spec: MetricSpec) -> str:
    return as_typed(show_interval(ci, spec.unit))


def _rows(n: int) -> str:
    return "1 test row" if n == 1 else f"{n:,} test rows"


def junit_xml(run: str, outcomes: Sequence[Outcome]) -> str:
    """The outcomes as JUnit XML, which build servers read."""
    failures, errors = (sum(o.passed is kind for o in outcomes) for kind in (False, None))
    counts = {"tests": str(len(outcomes)), "failures": str(failures), "errors": str(errors)}
    suite = ElementTree.Element("testsuite", {"name": "tell gate", **counts})
    for outcome in outcomes:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": one_line(run), "name": one_line(outcome.condition)}
        )
        if outcome.passed is not True:
            tag = "failure" if outcome.passed is False else "error"
            ElementTree.SubElement(case, tag, {"message": one_line(outcome.text), "type": WORDS[outcome.passed]})
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
