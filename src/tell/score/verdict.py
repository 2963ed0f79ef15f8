"""The verdict: one sentence that is true, whichever arm won and whichever arms there are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tell.metric_names import MetricSpec, metric
from tell.names import ARMS, RIVALS, arm
from tell.number_text import as_typed, has_interval, is_number, show, show_interval
from tell.shown import brief

MIN_ROWS = 6  # with fewer rows not even a sign test with all rows in one direction is significant at 5 %
CONTENT = (
    "field_accuracy",
    "exact_match",
    "item_f1",
    "exact_set",
    "micro_f1",
    "macro_f1",
    "schema_adherence",
)
"""Named where a rival is ahead in them; the form of answers last, since a constraint gives it for nothing."""
Entry = Mapping[str, Any]


def verdict(metrics: Mapping[str, Any]) -> str:
    """One sentence on what TELL gained on the task's primary metric, from ``metrics.json``.

    TELL is compared with the better of `base` and `base+anchor`, then with its rivals (`tell.names.RIVALS`), as far as
    they were scored. A rival whose interval of the difference contains 0 is never called beaten. The sentence names
    general loss that rose significantly, and arms that failed in training.
    """
    failed = [f"{arm(name).phrase} was not scored ({why})" for name, why in (metrics.get("failed") or {}).items()]
    same = [f"the arms {other} and {name} are one run" for name, other in (metrics.get("same") or {}).items()]
    sentence = "; ".join([_Verdict.of(metrics).sentence().removesuffix("."), *same, *failed]) + "."
    rows = (metrics.get("mixture") or {}).get("rows")
    if rows and not rows.get("general"):  # training on task rows alone is plain fine-tuning
        return "Without general rows this is SFT, not TELL: " + re.sub(r"\bTELL\b", "this run", sentence)
    return sentence


def against(metrics: Mapping[str, Any], other: str) -> str:
    """One sentence on TELL and another arm that is no rival of a run; empty without an interval of their difference."""
    found = _Verdict.of(metrics)
    gap = found._gap(other)
    if gap is None or gap.n < MIN_ROWS:
        return ""
    phrase, label = f"the {arm(other).phrase}", found.spec.phrase
    if gap.side < 0:
        return f"In {label} {phrase} is ahead of TELL by {gap.reversed.words(found.spec, '95 % interval ')}."
    words = f"(TELL minus {phrase}: {gap.words(found.spec, '95 % interval ')})"
    if gap.side > 0:
        return f"In {label} TELL is ahead of {phrase} {words}."
    return f"In {label} TELL and {phrase} do not differ clearly {words}."


@dataclass(frozen=True)
class _Gap:
    """A difference of two arms with its interval."""

    value: float
    low: float
    high: float
    n: int

    @property
    def side(self) -> int:
        """1 or -1 if the interval is above or below 0."""
        return int(self.low > 0) - int(self.high < 0)

    @property
    def reversed(self) -> _Gap:
        return _Gap(-self.value, -self.high, -self.low, self.n)

    def words(self, spec: MetricSpec, label: str = "") -> str:
        """``12 points, 3 to 21``."""
        shown = as_typed(show(self.value, spec.gap_unit, exact=True))
        if spec.gap_unit in ("points", "score"):
            shown += " point" if shown in ("1", "-1") else " points"
        return f"{shown}, {label}{_interval((self.low, self.high), spec)}"


@dataclass(frozen=True)
class _Verdict:
    """The data of the sentence: the primary metric, and each arm's entry for it."""

    metrics: Mapping[str, Any]
    spec: MetricSpec
    scored: Mapping[str, Entry]

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> _Verdict:
        arms = metrics.get("arms") or {}
        found = [name for entries in (arms.get("tell"), *arms.values()) for name in entries or {}]
        primary = str((metrics.get("task") or {}).get("primary"))
        primary = primary if primary in found else next(iter(found), "")
        entries = {name: _known((entries or {}).get(primary)) for name, entries in arms.items()}
        return cls(metrics, metric(primary), {name: entry for name, entry in entries.items() if entry is not None})

    def sentence(self) -> str:
        if not self.scored:
            return "No arm was scored, so there is no verdict."
        n = int(self.scored.get("tell", next(iter(self.scored.values()))).get("n", 0))
        rows = f"{n} test row" if n == 1 else f"{n} test rows"
        if n < MIN_ROWS:
            verb = "is" if n == 1 else "are"
            found = [f"{rows} {verb} too few for a verdict: {self.spec.phrase} is {self._values()}", *self._constant()]
        elif "tell" not in self.scored:
            values = self._values(intervals=True)
            found = [f"TELL was not scored: {self.spec.phrase} is {values} ({rows})", *self._constant()]
        else:
            forgetting = _Forgetting.of(self.metrics.get("forgetting") or {})
            rivals = [*self._rivals(forgetting), *self._content()]
            found = [self._gain(rows), *self._constant(), *rivals, *forgetting.clauses()]
        text = "; ".join(found)
        return f"{text[0].upper()}{text[1:]}."

    def _constant(self) -> Iterator[str]:
        """What the same answer to every row reaches, and whether TELL is above it."""
        baseline = self.metrics.get("baseline") or {}
        entry = _known((baseline.get("scores") or {}).get(self.spec.name))
        if entry is None:
            return
        text = f"answering “{brief(str(baseline.get('answer')))}” to everything gives {_value(entry, self.spec)}"
        gap = _as_gap((baseline.get("differences") or {}).get("tell"))
        if gap is not None and gap.n >= MIN_ROWS and gap.side <= 0:
            text += f", which TELL is not clearly above (TELL minus it: {gap.words(self.spec)})"
        yield text

    def _value(self, name: str) -> str:
        return _value(self.scored[name], self.spec)

    def _values(self, *, intervals: bool = False) -> str:
        parts = []
        for name, entry in self.scored.items():
            limits = _interval(entry.get("ci"), self.spec) if intervals else ""
            parts.append(
                f"{self._value(name)} for {arm(name).phrase}" + (f" (95 % interval {limits})" if limits else "")
            )
        return _and(parts)

    def _gap(self, name: str, spec: MetricSpec | None = None) -> _Gap | None:
        return _gap(self.metrics.get("differences"), "tell", name, (spec or self.spec).name)

    def _gain(self, rows: str) -> str:
        label, now = self.spec.phrase, self._value("tell")
        untuned = [a.name for a in ARMS.values() if a.adapter is None and not a.in_context and a.name in self.scored]
        if not untuned:
            limits = _interval(self.scored["tell"].get("ci"), self.spec)
            known = f"95 % interval {limits}; " if limits else ""
            gained = "as the untuned model was not scored, the gain is unknown"
            return f"TELL reaches {now} in {label} ({known}{rows}), and {gained}"
        best = max(untuned, key=lambda name: self.scored[name]["value"])  # the first of equals: base
        before = f"{self._value(best)} ({arm(best).phrase.removeprefix('the ')})"
        gap = self._gap(best)
        if gap is None:
            return f"{label} is {before} before and {now} with TELL ({rows}, no interval of the difference)"
        numbers = f"(difference {gap.words(self.spec, '95 % interval ')}; {rows})"
        if gap.side > 0:
            return f"TELL raises {label} from {before} to {now} {numbers}"
        if gap.side < 0:
            return f"TELL lost: {label} falls from {before} to {now} {numbers}"
        return f"TELL does not clearly change {label}: {before} before, {now} after {numbers}"

    def _rivals(self, forgetting: _Forgetting) -> Iterator[str]:
        """Rivals that do better, as well, or not clearly worse, then those that TELL is ahead of, then the unknown."""
        better: list[str] = []
        equal: list[str] = []
        close: list[str] = []
        behind: list[str] = []
        unknown: list[str] = []
        for name in RIVALS:
            if name not in self.scored:
                continue
            gap, rival = self._gap(name), arm(name).phrase
            if gap is None:
                unknown.append(f"{rival} reaches {self._value(name)} (no interval of the difference)")
            elif gap.side > 0:
                behind.append(f"{rival} (by {gap.words(self.spec)})")
            elif gap.side < 0:
                better.append(f"{rival} does better (by {gap.reversed.words(self.spec)}){forgetting.against(name)}")
            else:
                words, group = ("does as well", equal) if gap.value <= 0 else ("is not clearly worse", close)
                group.append(f"{rival} {words} (TELL minus it: {gap.words(self.spec)}){forgetting.against(name)}")
        yield from (*better, *equal, *close)
        if behind:
            yield f"TELL is ahead of {_and(behind)}"
        yield from unknown

    def _content(self) -> Iterator[str]:
        """Rivals that are significantly ahead in another metric than the primary one."""
        for spec in map(metric, CONTENT):
            for name in RIVALS:
                gap = self._gap(name, spec) if name in self.scored and spec != self.spec else None
                if gap is not None and gap.side < 0:
                    ahead = f"is ahead of TELL (by {gap.reversed.words(spec)})"
                    yield f"in {spec.phrase} {arm(name).phrase} {ahead}"


@dataclass(frozen=True)
class _Forgetting:
    """Measures on the general set whose source was not in the mix: training on Alpaca makes any model better on it."""

    set_name: str | None
    arms: Mapping[str, Any]
    differences: Mapping[str, Any]

    @classmethod
    def of(cls, forgetting: Mapping[str, Any]) -> _Forgetting:
        sets = forgetting.get("sets") or {}
        outside = [name for name, about in sets.items() if not (about or {}).get("in_mix_source", False)]
        name = "probe" if "probe" in outside or not sets else next(iter(outside), None)
        return cls(name, forgetting.get("arms") or {}, forgetting.get("differences") or {})

    def _entry(self, name: str, measure: str) -> Entry | None:
        return _known(((self.arms.get(name) or {}).get(self.set_name) or {}).get(measure))

    def _gap(self, a: str, b: str, measure: str) -> _Gap | None:
        return _gap(self.differences, a, b, self.set_name or "", measure)

    def clauses(self) -> Iterator[str]:
        """General loss that rose, and leaks of the task's format, where significant."""
        loss, leak = (self._gap("tell", "base", measure) for measure in ("loss", "task_format"))
        if loss is not None and loss.side > 0 and loss.n >= MIN_ROWS:
            numbers = f"{loss.value:.2g} ({loss.low:.2g} to {loss.high:.2g})"
            yield f"TELL forgets: loss on general text outside the mix rises by {numbers}"
        after = self._entry("tell", "task_format")
        if leak is not None and leak.side > 0 and leak.n >= MIN_ROWS and after is not None:
            yield f"TELL answers {_value(after, metric('task_format'))} of general prompts in the task's format"

    def against(self, rival: str) -> str:
        """The general loss that a rival, no worse on the task, costs or saves, if that is significant."""
        rival = arm(rival).adapter or rival  # whose weights it has
        own, other = self._entry("tell", "loss"), self._entry(rival, "loss")
        if own is None or other is None:
            return ""
        sign = self._order(rival)
        values = f"loss on general text {other['value']:.2f} against {own['value']:.2f}"
        if sign > 0:
            rise = self._gap(rival, "base", "loss")
            forgets = rise is not None and rise.side > 0
            return f" but forgets more ({values})" if forgets else f" but ends with a higher {values}"
        return f" and ends with a lower {values}" if sign < 0 else ""

    def _order(self, rival: str) -> int:
        """1 if the rival's loss is significantly above TELL's, -1 if below, 0 if neither is known."""
        direct = self._gap(rival, "tell", "loss")
        if direct is not None:
            return direct.side if direct.n >= MIN_ROWS else 0
        own, other = (self._gap(name, "base", "loss") for name in ("tell", rival))
        if own is None or other is None or min(own.n, other.n) < MIN_ROWS:
            return 0
        return int(other.low > own.high) - int(other.high < own.low)  # disjoint intervals: stricter than 5 %


def _gap(differences: Mapping[str, Any] | None, a: str, b: str, *path: str) -> _Gap | None:
    """The difference ``a - b`` at ``path``, also if only ``b - a`` was written."""
    for key, reverse in ((f"{a} - {b}", False), (f"{b} - {a}", True)):
        found = (differences or {}).get(key)
        for part in path:
            found = (found or {}).get(part)
        if (gap := _as_gap(found)) is not None:
            return gap.reversed if reverse else gap
    return None


def _as_gap(found: Entry | None) -> _Gap | None:
    """A difference as metrics.json has it; None without its interval."""
    entry = _known(found)
    if entry is not None and has_interval(ci := entry.get("ci")):
        return _Gap(entry["value"], ci[0], ci[1], int(entry.get("n", 0)))
    return None


def _known(entry: Entry | None) -> Entry | None:
    """An entry that has a value."""
    return entry if entry and is_number(entry.get("value")) else None


def _value(entry: Entry, spec: MetricSpec) -> str:
    return as_typed(show(entry["value"], spec.unit, exact=True))


def _interval(ci: object, spec: MetricSpec) -> str:
    return as_typed(show_interval(ci, spec.unit, exact=True))


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
