"""The verdict: one sentence that is true, whichever arm won and whichever arms there are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tell.names import NAMES, unit_of

MIN_ROWS = 6  # with fewer rows even a sign test of all rows in one direction is not significant at 5 %

# In a sentence a share is called one.
_LABELS = {**NAMES, "valid_json": "the share of valid JSON", "valid_label": "the share of valid labels"}
_ARMS = {
    "base": "the untuned model",
    "base+anchor": "the untuned model with the anchor",
    "icl": "the untuned model with examples in context",
    "sft": "SFT",
    "sft-matched": "step-matched SFT",
    "general": "tuning on general data alone",
    "tell": "TELL",
    "tell-anchor": "TELL without its anchor",
}
_CONTENT = ("field_accuracy", "macro_f1")  # what an answer says, where the primary metric is its form or its count
_RIVALS = ("sft-matched", "sft", "icl", "general")


@dataclass(frozen=True)
class _Scale:
    """How one metric is written: shares as percent, chrF++ and BLEU of 100, a user's own as they are."""

    factor: float
    unit: str
    points: bool

    @classmethod
    def of(cls, metric: str) -> _Scale:
        unit = unit_of(metric)
        return cls(100.0, " %", True) if unit == "share" else cls(1.0, "", unit == "score")

    def number(self, value: float) -> str:
        scaled = value * self.factor
        decimals = 1 if self.points else 3
        full = 100.0 if self.unit else None  # 99.97 % is not 100 %, nor 0.02 % nothing
        while decimals < 6 and (
            (round(scaled, decimals) == 0 and scaled != 0) or (round(scaled, decimals) == full and scaled != full)
        ):
            decimals += 1
        return f"{round(scaled, decimals) + 0.0:.6g}"

    def value(self, value: float) -> str:
        return f"{self.number(value)}{self.unit}"

    def gap(self, value: float) -> str:
        shown = self.number(value)
        if not self.points:
            return shown
        return f"{shown} point" if shown in ("1", "-1") else f"{shown} points"

    def interval(self, low: float, high: float) -> str:
        return f"{self.number(low)} to {self.number(high)}"


@dataclass(frozen=True)
class _Gap:
    """A difference of two arms with its interval."""

    value: float
    low: float
    high: float
    n: int


def verdict(metrics: dict) -> str:
    """One sentence on what TELL gained on the task's primary metric, from ``metrics.json``.

    TELL is compared with the better of `base` and `base+anchor`, then with `sft-matched`, `sft`,
    `icl` and `general`, as far as they were scored. A rival whose interval of the difference holds 0
    is never said to be beaten. Forgetting is told where loss on the probe rose significantly, and which arms
    failed in training.
    """
    failed = [f"{_ARMS.get(arm, arm)} was not scored ({why})" for arm, why in (metrics.get("failed") or {}).items()]
    same = [f"the arms {other} and {arm} are one run" for arm, other in (metrics.get("same") or {}).items()]
    sentence = "; ".join([_verdict(metrics).removesuffix("."), *same, *failed]) + "."
    return sentence if _has_general_rows(metrics) else _as_sft(sentence)


def _has_general_rows(metrics: dict) -> bool:
    """Whether `tell` was trained with general rows, or that is not said."""
    rows = (metrics.get("mixture") or {}).get("rows")
    return not rows or bool(rows.get("general"))


def _as_sft(sentence: str) -> str:
    """The verdict on a run of task rows alone, which is plain fine-tuning under whatever name."""
    return "Without general rows this is SFT, not TELL: " + re.sub(r"\bTELL\b", "this run", sentence)


def _verdict(metrics: dict) -> str:
    arms = metrics.get("arms") or {}
    metric = _primary(metrics, arms)
    scored = {arm: entry for arm, rows in arms.items() if _known(entry := (rows or {}).get(metric))}
    if metric is None or not scored:
        return "No arm was scored, so there is no verdict."
    scale, label = _Scale.of(metric), _label(metric)
    n = int(scored.get("tell", next(iter(scored.values()))).get("n", 0))
    rows = f"{n} test row" if n == 1 else f"{n} test rows"
    if n < MIN_ROWS:
        verb = "is" if n == 1 else "are"
        return f"{rows} {verb} too few for a verdict: {label} is {_list(scored, scale)}."
    if "tell" not in scored:
        return f"TELL was not scored: {label} is {_list(scored, scale, intervals=True)} ({rows})."
    clauses = [_gain(metrics, metric, scored, scale, label, rows)]
    clauses += _rivals(metrics, metric, scored, scale)
    clauses += _elsewhere(metrics, metric, scored)
    clauses += _forgetting(metrics)
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _gain(metrics: dict, metric: str, scored: dict, scale: _Scale, label: str, rows: str) -> str:
    tell = scored["tell"]["value"]
    untuned = [arm for arm in ("base", "base+anchor") if arm in scored]
    if not untuned:
        interval = f"95 % interval {scale.interval(*scored['tell']['ci'])}; " if _has_interval(scored["tell"]) else ""
        return (
            f"TELL reaches {scale.value(tell)} in {label} ({interval}{rows}), and as the untuned model was not scored, "
            "what it gained is not known"
        )
    best = max(untuned, key=lambda arm: scored[arm]["value"])  # the first of equals: base
    before = f"{scale.value(scored[best]['value'])} ({_ARMS[best].removeprefix('the ')})"
    gap = _gap(metrics.get("differences"), "tell", best, metric)
    if gap is None:
        return f"{label} is {before} before and {scale.value(tell)} with TELL ({rows}, no interval of the difference)"
    numbers = f"(difference {scale.gap(gap.value)}, 95 % interval {scale.interval(gap.low, gap.high)}; {rows})"
    if gap.low > 0:
        return f"TELL raises {label} from {before} to {scale.value(tell)} {numbers}"
    if gap.high < 0:
        return f"TELL lost: {label} falls from {before} to {scale.value(tell)} {numbers}"
    return f"TELL does not clearly change {label}: {before} before, {scale.value(tell)} after {numbers}"


def _rivals(metrics: dict, metric: str, scored: dict, scale: _Scale) -> list[str]:
    better, equal, close, behind, open_ = [], [], [], [], []
    for arm in _RIVALS:
        if arm not in scored:
            continue
        gap = _gap(metrics.get("differences"), "tell", arm, metric)
        if gap is None:
            open_.append(f"{_ARMS[arm]} reaches {scale.value(scored[arm]['value'])} (no interval of the difference)")
            continue
        interval = scale.interval(gap.low, gap.high)
        if gap.low > 0:
            behind.append(f"{_ARMS[arm]} (by {scale.gap(gap.value)}, {interval})")
        elif gap.high < 0:
            by = f"by {scale.gap(-gap.value)}, {scale.interval(-gap.high, -gap.low)}"
            better.append(f"{_ARMS[arm]} does better ({by}){_loss_against(metrics, arm)}")
        else:
            words, group = ("does as well", equal) if gap.value <= 0 else ("is not clearly worse", close)
            numbers = f"(TELL minus it: {scale.gap(gap.value)}, {interval})"
            group.append(f"{_ARMS[arm]} {words} {numbers}{_loss_against(metrics, arm)}")
    ahead = [f"TELL is ahead of {_and(behind)}"] if behind else []
    return [*better, *equal, *close, *ahead, *open_]


def _elsewhere(metrics: dict, primary: str, scored: dict) -> list[str]:
    """Rivals that are significantly ahead in the content of the answers, whatever the primary metric says."""
    ahead = []
    for metric in _CONTENT:
        if metric == primary:
            continue
        scale = _Scale.of(metric)
        for arm in _RIVALS:
            gap = _gap(metrics.get("differences"), "tell", arm, metric) if arm in scored else None
            if gap is not None and gap.high < 0:
                numbers = f"(by {scale.gap(-gap.value)}, {scale.interval(-gap.high, -gap.low)})"
                ahead.append(f"in {_label(metric)} {_ARMS[arm]} is ahead of TELL {numbers}")
    return ahead


def _loss_against(metrics: dict, arm: str) -> str:
    """What a rival that is no worse on the task costs or saves in general loss, where that is significant."""
    forgetting = metrics.get("forgetting") or {}
    name = _probe(forgetting)
    losses = [((forgetting.get("arms") or {}).get(a) or {}).get(name, {}).get("loss") for a in ("tell", arm)]
    if name is None or not all(_known(loss) for loss in losses):
        return ""
    sign = _loss_order(forgetting, arm, name)
    values = f"loss on general text {losses[1]['value']:.2f} against {losses[0]['value']:.2f}"
    if sign > 0:
        rise = _gap(forgetting.get("differences"), arm, "base", name, "loss")
        forgets = rise is not None and rise.low > 0
        return f" but forgets more ({values})" if forgets else f" but ends with a higher {values}"
    return f" and ends with a lower {values}" if sign < 0 else ""


def _loss_order(forgetting: dict, arm: str, name: str) -> int:
    """1 if the rival's loss is significantly above TELL's, -1 if below, 0 if that cannot be told."""
    differences = forgetting.get("differences")
    direct = _gap(differences, arm, "tell", name, "loss")
    if direct is not None:
        return 0 if direct.n < MIN_ROWS else int(direct.low > 0) - int(direct.high < 0)
    tell, rival = (_gap(differences, a, "base", name, "loss") for a in ("tell", arm))
    if tell is None or rival is None or min(tell.n, rival.n) < MIN_ROWS:
        return 0
    return int(rival.low > tell.high) - int(rival.high < tell.low)  # disjoint intervals: stricter than 5 %


def _forgetting(metrics: dict) -> list[str]:
    forgetting = metrics.get("forgetting") or {}
    name = _probe(forgetting)
    if name is None:
        return []
    clauses = []
    loss = _gap(forgetting.get("differences"), "tell", "base", name, "loss")
    if loss is not None and loss.low > 0 and loss.n >= MIN_ROWS:
        numbers = f"{loss.value:.2g} ({loss.low:.2g} to {loss.high:.2g})"
        clauses.append(f"TELL forgets: loss on general text outside the mix rises by {numbers}")
    leak = _gap(forgetting.get("differences"), "tell", "base", name, "task_format")
    after = ((forgetting.get("arms") or {}).get("tell") or {}).get(name, {}).get("task_format")
    if leak is not None and leak.low > 0 and leak.n >= MIN_ROWS and _known(after):
        share = _Scale.of("accuracy").value(after["value"])
        clauses.append(f"TELL answers {share} of general prompts in the task's format")
    return clauses


def _probe(forgetting: dict) -> str | None:
    """The set whose source was not in the mix: training on Alpaca makes any model better on Alpaca."""
    sets = forgetting.get("sets") or {}
    outside = [name for name, about in sets.items() if not (about or {}).get("in_mix_source", False)]
    return "probe" if "probe" in outside or not sets else next(iter(outside), None)


def _gap(differences: dict | None, a: str, b: str, *path: str) -> _Gap | None:
    """The difference ``a - b`` at ``path``, also where only ``b - a`` was written down."""
    for key, sign in ((f"{a} - {b}", 1), (f"{b} - {a}", -1)):
        entry = (differences or {}).get(key)
        for part in path:
            entry = (entry or {}).get(part)
        if _known(entry) and _has_interval(entry):
            low, high = sorted(sign * limit for limit in entry["ci"])
            return _Gap(sign * entry["value"], low, high, int(entry.get("n", 0)))
    return None


def _primary(metrics: dict, arms: dict) -> str | None:
    """The task's primary metric, else the first one that TELL, or any arm, has."""
    named = (metrics.get("task") or {}).get("primary")
    found = [metric for rows in (arms.get("tell"), *arms.values()) for metric in rows or {}]
    return named if named in found else next(iter(found), None)


def _known(entry: dict | None) -> bool:
    return bool(entry) and entry.get("value") is not None


def _has_interval(entry: dict) -> bool:
    limits = entry.get("ci") or [None]
    return len(limits) == 2 and None not in limits


def _label(metric: str) -> str:
    if metric.startswith("field:"):
        return f"accuracy of the field {metric.removeprefix('field:')}"
    return _LABELS.get(metric, metric)


def _list(scored: dict, scale: _Scale, *, intervals: bool = False) -> str:
    parts = []
    for arm, entry in scored.items():
        limits = ""
        if intervals and _has_interval(entry):
            limits = f" (95 % interval {scale.interval(*entry['ci'])})"
        parts.append(f"{scale.value(entry['value'])} for {_ARMS.get(arm, arm)}{limits}")
    return _and(parts)


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
