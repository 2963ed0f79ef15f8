"""Tables of scores: arms with intervals, differences, forgetting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from tell.metric_names import METRICS, MetricSpec, metric
from tell.names import arm, arm_order
from tell.number_text import Unit, has_interval, is_number, show
from tell.parts import PARTS
from tell.report.html_text import shorten
from tell.report.read_run import get, mapping, rows_of
from tell.report.svg import SHARE, Scale, axis_strip, interval_strip

MINUS = " - "
CONSTANT = "constant answer"
"""What `baseline` of metrics.json is called: one answer to every test row."""
READINGS = {1: "more than before", -1: "less than before", 0: "no change seen"}


@dataclass
class Cell:
    """One number of a table: as in ``metrics.json``, with the unit it is shown in."""

    value: object = None
    ci: object = None
    n: object = None
    unit: Unit = "plain"
    signed: bool = False

    @classmethod
    def of(cls, entry: object, unit: Unit, *, signed: bool = False) -> Cell:
        if is_number(entry):
            return cls(entry, unit=unit, signed=signed)
        return cls(get(entry, "value"), get(entry, "ci"), get(entry, "n"), unit, signed)

    @property
    def known(self) -> bool:
        return is_number(self.value)

    @property
    def side(self) -> int:
        """1 or -1 if the interval is wholly above or below 0, else 0."""
        return int(self.ci[0] > 0) - int(self.ci[1] < 0) if has_interval(self.ci) else 0

    def strip(self, scale: Scale, *, style: str = "", zero: float | None = None) -> Markup:
        return interval_strip(self.value, self.ci, scale, style=style, zero=zero)


@dataclass
class Line:
    """One row of a plotted table."""

    name: str
    note: str
    cell: Cell
    strip: Markup
    reading: str = ""
    mark: str = ""
    more: Cell | None = None


@dataclass
class Plotted:
    """A table next to a dot-and-interval plot."""

    term: MetricSpec
    lines: list[Line]
    axis: Markup
    heading: str = ""
    note: str = ""


@dataclass
class Grid:
    """A table of every metric: ``rows`` are (name, cells)."""

    terms: list[MetricSpec]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)


def primary_metric(metrics: dict[str, Any]) -> str | None:
    """The metric of the verdict; if the file does not name it, the first one found."""
    named, arms = get(metrics, "task", "primary"), mapping(metrics, "arms")
    if isinstance(named, str):
        return named
    return next((name for key in ("tell", *arms) for name in mapping(arms, key)), None)


def metric_names(tables: Iterable[object], primary: str | None) -> list[str]:
    """All metrics of several arms' entries, the primary one first."""
    names = [name for table in tables if isinstance(table, dict) for name in table]
    return list(dict.fromkeys([*([primary] if primary in names else []), *names]))


def winner(metrics: dict[str, Any]) -> str | None:
    """The arm ahead of every other by an interval that excludes 0, or None. Another arm with TELL's
    adapter is not a contender."""
    primary = primary_metric(metrics)
    arms = [
        name
        for name in mapping(metrics, "arms")
        if (arm(name).adapter != "tell" or name == "tell") and get(metrics, "arms", name, primary or "")
    ]
    if not primary or len(arms) < 2:
        return None
    better = 1 if metric(primary).higher_is_better else -1

    def side(a: str, b: str) -> int:
        ahead, behind = (
            Cell.of(get(metrics, "differences", f"{left}{MINUS}{right}", primary), "plain").side
            for left, right in ((a, b), (b, a))
        )
        return ahead or -behind

    return next((a for a in arms if all(side(a, b) == better for b in arms if b != a)), None)


def arm_table(metrics: dict[str, Any]) -> Plotted | None:
    """The primary metric of each arm."""
    primary, arms = primary_metric(metrics), mapping(metrics, "arms")
    names = [name for name in arm_order(arms) if primary and get(arms, name, primary) is not None]
    if not names or primary is None:
        return None
    what, best = metric(primary), winner(metrics)
    cells = {name: Cell.of(arms[name][primary], what.unit) for name in names}
    scale = scale_of(cells.values(), what)
    lines = []
    for name, cell in cells.items():
        strip = cell.strip(scale, style="ahead" if name == best else "own" if name == "tell" else "")
        mark = "ahead of all others" if name == best else ""
        lines.append(Line(name, _note(name, mapping(metrics, "same")), cell, strip, mark=mark))
    if (entry := get(metrics, "baseline", "scores", primary)) is not None:
        cell = Cell.of(entry, what.unit)
        note = f"always “{shorten(str(get(metrics, 'baseline', 'answer')), 60)}”"
        lines.append(Line(CONSTANT, note, cell, cell.strip(scale)))
    return Plotted(what, lines, axis(scale, what.unit))


def _note(name: str, same: Mapping[str, str]) -> str:
    """The description of an arm, with the arms that are one run with it."""
    known = arm(name)
    words = known.label if known.about and known.label.casefold() != name else ""
    twins = [other for other, shown in same.items() if shown == name]
    return "; ".join(filter(None, [words, f"one run with {', '.join(twins)}" if twins else ""]))


def arm_grid(metrics: dict[str, Any]) -> Grid | None:
    """Every metric of each arm."""
    arms = mapping(metrics, "arms")
    constant = mapping(metrics, "baseline", "scores")
    rows = {name: arms[name] for name in arm_order(arms)} | ({CONSTANT: constant} if constant else {})
    return _grid(rows, primary_metric(metrics))


def difference_table(metrics: dict[str, Any]) -> Plotted | None:
    """The primary metric's differences, plotted around 0."""
    return _plotted_differences(metrics, dict.fromkeys(mapping(metrics, "differences"), ""))


def parts_table(metrics: dict[str, Any]) -> Plotted | None:
    """What each part of the method brought in the primary metric, to TELL and to its controls."""
    pairs = {f"{a}{MINUS}{b}": part.label for part in PARTS for a, b in part.pairs}
    return _plotted_differences(metrics, pairs)


def _plotted_differences(metrics: dict[str, Any], notes: Mapping[str, str]) -> Plotted | None:
    """The primary metric's differences of these names, as far as they were measured, each with its note."""
    primary, table = primary_metric(metrics), mapping(metrics, "differences")
    names = [key for key in notes if primary and get(table, key, primary) is not None]
    if not names or primary is None:
        return None
    what = metric(primary)
    cells = {key: Cell.of(table[key][primary], what.gap_unit, signed=True) for key in names}
    scale = Scale.over(_extent(cells.values()), hold=[0.0])
    lines = []
    for key, cell in cells.items():
        left, right = pair(key)
        good = cell.side * (1 if what.higher_is_better else -1)
        reading = {1: f"{left} better", -1: f"{left} worse", 0: "not significant"}[good]
        strip = cell.strip(scale, style={1: "ahead", -1: "behind", 0: ""}[good], zero=0.0)
        lines.append(Line(f"{left} − {right}" if right else key, notes[key], cell, strip, reading))
    return Plotted(what, lines, axis(scale, what.gap_unit, sign=True))


@dataclass
class ReadoutLine:
    """One closed field's readout: as in ``readout`` of metrics.json."""

    name: str
    values: object
    accuracy: object
    loss: object
    prior_loss: object
    used: bool


def readout_lines(metrics: dict[str, Any]) -> list[ReadoutLine]:
    """The readout of each closed field."""
    return [
        ReadoutLine(
            str(row.get("field")),
            row.get("classes"),
            row.get("accuracy"),
            row.get("loss"),
            row.get("prior_loss"),
            row.get("used") is True,
        )
        for row in rows_of(metrics, "readout")
        if isinstance(row, dict)
    ]


def difference_grid(metrics: dict[str, Any]) -> Grid | None:
    """Every metric's differences."""
    return _grid(mapping(metrics, "differences"), primary_metric(metrics), signed=True)


def forgetting_tables(metrics: dict[str, Any]) -> list[Plotted]:
    """A table per general set and measure: loss first, then the share answered in the task's format."""
    sets, arms, differences = (mapping(metrics, "forgetting", part) for part in ("sets", "arms", "differences"))
    names = dict.fromkeys(
        [*sets, *(name for entries in arms.values() if isinstance(entries, dict) for name in entries)]
    )
    tables = []
    for what in (METRICS["loss"], METRICS["task_format"]):
        for name in names:
            cells = _cells(arms, what, name, what.name)
            if cells:
                changes = {key: get(differences, f"{key}{MINUS}base", name, what.name) for key in cells}
                table = before_and_after(what, cells, changes)
                table.heading, table.note = f"{what.label}: {name}", _set_note(mapping(sets, name))
                tables.append(table)
    return tables


def _cells(arms: dict[str, Any], what: MetricSpec, *path: str) -> dict[str, Cell]:
    """The entries at ``path`` of each arm that has one."""
    found = {name: get(arms, name, *path) for name in arm_order(arms)}
    return {name: Cell.of(entry, what.unit) for name, entry in found.items() if entry is not None}


def before_and_after(what: MetricSpec, cells: dict[str, Cell], changes: Mapping[str, object]) -> Plotted:
    """A metric of each arm with its change from the untuned model.

    Args:
        cells: arm to its value.
        changes: arm to its difference from the untuned model, None if it has none.
    """
    scale = SHARE if what.unit == "share" else Scale.over(_extent(cells.values()), number=3)
    lines = []
    for name, cell in cells.items():
        more = Cell.of(changes[name], what.gap_unit, signed=True) if changes.get(name) is not None else None
        side = more.side if more else 0
        style = {1: "ahead", -1: "behind", 0: ""}[side if what.higher_is_better else -side]
        lines.append(Line(name, "", cell, cell.strip(scale, style=style), READINGS[side] if more else "", more=more))
    return Plotted(what, lines, axis(scale, what.unit))


def axis(scale: Scale, unit: Unit, *, sign: bool = False) -> Markup:
    """The axis under a plot of values in ``unit``."""

    def label(tick: float) -> str:
        if unit in ("share", "points", "score"):
            return show(tick, unit, sign=sign).replace(".0", "")
        return f"{tick:{'+' if sign and tick else ''}g}".replace("-", "−")

    return axis_strip(scale, label)


def general_answers(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompts answered before and after: ``{"prompt", "reference", "answers": {arm: text}}``."""
    out = []
    for row in rows_of(metrics, "forgetting", "answers"):
        if isinstance(row, dict):
            arms = arm_order(key for key in row if key not in ("prompt", "reference"))
            answers = {name: row[name] for name in arms if isinstance(row[name], str)}
            out.append({"prompt": row.get("prompt"), "reference": row.get("reference"), "answers": answers})
    return out


def pair(key: str) -> tuple[str, str]:
    """``"tell - base"`` to its two arms; the second is empty if the key has another form."""
    left, _, right = key.partition(MINUS)
    return left, right


def _grid(table: Mapping[str, object], primary: str | None, *, signed: bool = False) -> Grid | None:
    names = metric_names(table.values(), primary)
    if not names:
        return None
    grid = Grid([metric(name) for name in names])
    for key, entries in table.items():
        cells = [
            Cell.of(get(entries, what.name), what.gap_unit if signed else what.unit, signed=signed)
            for what in grid.terms
        ]
        if any(cell.known for cell in cells):
            left, right = pair(key)
            grid.rows.append((f"{left} − {right}" if signed and right else key, cells))
    return grid


def _extent(cells: Iterable[Cell]) -> list[float]:
    parts = [[cell.value, *(cell.ci if has_interval(cell.ci) else ())] for cell in cells]
    return [value for part in parts for value in part if is_number(value)]


def scale_of(cells: Iterable[Cell], what: MetricSpec) -> Scale:
    """The axis of a metric's values: 0 to 100 % if it is a share."""
    extent = _extent(cells)
    return SHARE if what.unit == "share" and all(0 <= v <= 1 for v in extent) else Scale.over(extent)


def _set_note(entry: Mapping[str, Any]) -> str:
    rows = f"{entry['rows']:,} rows" if is_number(entry.get("rows")) else "Rows"
    held = {True: " held out of the source that was in the mix", False: " that were not in the mix at all", None: ""}
    origin = f" ({entry['origin']})" if entry.get("origin") else ""
    return f"{rows}{held[entry.get('in_mix_source')]}{origin}" if entry else ""


def leading_scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """Score and general loss of the leading arm, next to the untuned model's."""
    name, arms, sets = primary_metric(metrics), mapping(metrics, "arms"), mapping(metrics, "forgetting", "arms")
    lead = next((arm for arm in ("tell", *arm_order(arms)) if arm in arms), "")
    spec, first = metric(name) if name else None, next(iter(mapping(sets, lead)), "")
    values = [get(arms, arm, name or "", "value") for arm in (lead, "base")]
    values += [get(sets, arm, first, "loss", "value") for arm in (lead, "base")]
    score, base, loss, base_loss = (value if is_number(value) else None for value in values)
    shown, before = ("" if spec is None or value is None else show(value, spec.unit) for value in (score, base))
    label = spec.label if spec and shown else ""
    return {"score": score, "shown": shown, "base": before, "metric": label, "loss": loss, "base_loss": base_loss}
