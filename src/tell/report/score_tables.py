"""Tables of scores: arms with intervals, differences, forgetting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from tell.report.glossary import ARMS, Term, arm_order, term
from tell.report.html_text import has_interval, is_number, number
from tell.report.read_run import get, mapping, rows_of
from tell.report.svg import SHARE, Scale, axis_strip, interval_strip

MINUS = " - "


@dataclass
class Cell:
    """One number of a table: as in ``metrics.json``, with the unit it is shown in."""

    value: Any = None
    ci: Any = None
    n: Any = None
    unit: str = "plain"
    signed: bool = False

    @classmethod
    def of(cls, entry: Any, unit: str, *, signed: bool = False) -> Cell:
        if is_number(entry):
            return cls(entry, unit=unit, signed=signed)
        return cls(get(entry, "value"), get(entry, "ci"), get(entry, "n"), unit, signed)

    @property
    def known(self) -> bool:
        return is_number(self.value)

    @property
    def side(self) -> int:
        """1 or -1 where the interval lies wholly above or below 0, else 0."""
        if not has_interval(self.ci):
            return 0
        return 1 if self.ci[0] > 0 else -1 if self.ci[1] < 0 else 0


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
    """A table with a dot-and-interval plot beside it."""

    term: Term
    lines: list[Line]
    axis: Markup
    heading: str = ""
    note: str = ""


@dataclass
class Grid:
    """A table of every metric: ``rows`` are (name, cells)."""

    terms: list[Term]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)


def primary_metric(metrics: dict[str, Any]) -> str | None:
    """The metric of the verdict; the first one there is where the file does not say."""
    named = get(metrics, "task", "primary")
    arms = mapping(metrics, "arms")
    if isinstance(named, str):
        return named
    return next((m for arm in ("tell", *arms) for m in mapping(arms, arm)), None)


def metric_names(table: dict[str, Any], primary: str | None) -> list[str]:
    """All metrics of a table of arms, the primary one first."""
    names = [m for row in table.values() if isinstance(row, dict) for m in row]
    return list(dict.fromkeys([*([primary] if primary in names else []), *names]))


def winner(metrics: dict[str, Any]) -> str | None:
    """The arm ahead of every other by an interval that excludes 0, or None. ``tell-anchor`` is no contender,
    it is the tell adapter again."""
    primary = primary_metric(metrics)
    arms = [a for a in mapping(metrics, "arms") if a != "tell-anchor" and get(metrics, "arms", a, primary or "")]
    if not primary or len(arms) < 2:
        return None
    better = 1 if term(primary).higher else -1

    def side(a: str, b: str) -> int:
        ahead = Cell.of(get(metrics, "differences", f"{a}{MINUS}{b}", primary), "plain").side
        return ahead or -Cell.of(get(metrics, "differences", f"{b}{MINUS}{a}", primary), "plain").side

    return next((a for a in arms if all(side(a, b) == better for b in arms if b != a)), None)


def arm_table(metrics: dict[str, Any]) -> Plotted | None:
    """The primary metric of each arm."""
    primary = primary_metric(metrics)
    arms = mapping(metrics, "arms")
    names = [a for a in arm_order(list(arms)) if primary and get(arms, a, primary) is not None]
    if not names or primary is None:
        return None
    what, best = term(primary), winner(metrics)
    cells = {a: Cell.of(arms[a][primary], what.unit) for a in names}
    scale = scale_of(list(cells.values()), what)
    lines = [
        Line(
            name=a,
            note=_note(a, mapping(metrics, "same")),
            cell=cells[a],
            strip=interval_strip(
                cells[a].value, cells[a].ci, scale, style="ahead" if a == best else "own" if a == "tell" else ""
            ),
            mark="ahead of all others" if a == best else "",
        )
        for a in names
    ]
    return Plotted(what, lines, axis_strip(scale, lambda t: number(t, what.unit).replace(".0", "")))


def _note(arm: str, same: dict[str, Any]) -> str:
    """What an arm is, and which others are one run with it."""
    twins = [other for other, standing in same.items() if standing == arm]
    words = [ARMS[arm][0]] if arm in ARMS else []
    return "; ".join([*words, *([f"one run with {', '.join(twins)}"] if twins else [])])


def arm_grid(metrics: dict[str, Any]) -> Grid | None:
    """Every metric of each arm."""
    return _grid(mapping(metrics, "arms"), primary_metric(metrics), signed=False)


def difference_table(metrics: dict[str, Any]) -> Plotted | None:
    """The primary metric's differences, with a plot around 0."""
    primary = primary_metric(metrics)
    table = mapping(metrics, "differences")
    names = [k for k in table if primary and get(table, k, primary) is not None]
    if not names or primary is None:
        return None
    what = term(primary)
    unit = "points" if what.unit == "share" else what.unit
    cells = {k: Cell.of(table[k][primary], unit, signed=True) for k in names}
    scale = Scale.over(_extent(list(cells.values())), hold=[0.0])
    lines = []
    for key in names:
        cell, (left, right) = cells[key], pair(key)
        good = cell.side * (1 if what.higher else -1)
        reading = {1: f"{left} better", -1: f"{left} worse", 0: "not told apart"}[good]
        style = {1: "ahead", -1: "behind", 0: ""}[good]
        strip = interval_strip(cell.value, cell.ci, scale, style=style, zero=0.0)
        lines.append(Line(f"{left} − {right}" if right else key, "", cell, strip, reading))
    return Plotted(what, lines, axis_strip(scale, lambda t: number(t, unit, sign=True).replace(".0", "")))


def difference_grid(metrics: dict[str, Any]) -> Grid | None:
    """Every metric's differences."""
    return _grid(mapping(metrics, "differences"), primary_metric(metrics), signed=True)


def forgetting_tables(metrics: dict[str, Any]) -> list[Plotted]:
    """A table per general set and measure: loss first, then the share answered in the task's format."""
    sets, arms = mapping(metrics, "forgetting", "sets"), mapping(metrics, "forgetting", "arms")
    differences = mapping(metrics, "forgetting", "differences")
    names = list(dict.fromkeys([*sets, *(s for a in arms.values() if isinstance(a, dict) for s in a)]))
    tables = []
    for name in names:
        for measure in ("loss", "task_format"):
            what = term(measure)
            cells = {
                a: Cell.of(arms[a][name][measure], what.unit)
                for a in arm_order(list(arms))
                if get(arms, a, name, measure) is not None
            }
            if not cells:
                continue
            changes = {a: get(differences, f"{a}{MINUS}base", name, measure) for a in cells}
            heading, note = f"{what.label}: {name}", _set_note(mapping(sets, name))
            tables.append(before_and_after(what, cells, changes, higher=False, heading=heading, note=note))
    return sorted(tables, key=lambda t: t.term.label != "Loss")


def before_and_after(
    what: Term, cells: dict[str, Cell], changes: dict[str, Any], *, higher: bool, heading: str, note: str
) -> Plotted:
    """A metric of each arm with its change from the untuned model.

    Args:
        cells: arm to its value.
        changes: arm to its difference from the untuned model, None where there is none.
        higher: more is better.
    """
    scale = SHARE if what.unit == "share" else Scale.over(_extent(list(cells.values())), number=3)
    unit = "points" if what.unit == "share" else what.unit
    lines = []
    for arm, cell in cells.items():
        more = Cell.of(changes[arm], unit, signed=True) if changes.get(arm) is not None else None
        side = more.side if more else 0
        reading = {1: "more than before", -1: "less than before", 0: "no change seen"}[side] if more else ""
        style = {1: "ahead", -1: "behind", 0: ""}[side if higher else -side]
        strip = interval_strip(cell.value, cell.ci, scale, style=style)
        lines.append(Line(arm, "", cell, strip, reading, more=more))
    axis = axis_strip(scale, lambda t: number(t, "share").replace(".0", "") if what.unit == "share" else f"{t:g}")
    return Plotted(what, lines, axis, heading, note)


def general_answers(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompts answered before and after: ``{"prompt", "reference", "answers": {arm: text}}``."""
    out = []
    for row in rows_of(metrics, "forgetting", "answers"):
        if isinstance(row, dict):
            answers = {a: row[a] for a in arm_order([k for k in row if k not in ("prompt", "reference")])}
            answers = {a: text for a, text in answers.items() if isinstance(text, str)}
            out.append({"prompt": row.get("prompt"), "reference": row.get("reference"), "answers": answers})
    return out


def pair(key: str) -> tuple[str, str]:
    """``"tell - base"`` to its two arms; the second is empty where the key has another form."""
    left, _, right = key.partition(MINUS)
    return left, right


def _grid(table: dict[str, Any], primary: str | None, *, signed: bool) -> Grid | None:
    names = metric_names(table, primary)
    if not names:
        return None
    grid = Grid([term(m) for m in names])
    order = list(table) if signed else arm_order(list(table))
    for key in order:
        cells = []
        for name, what in zip(names, grid.terms, strict=True):
            unit = "points" if signed and what.unit == "share" else what.unit
            cells.append(Cell.of(get(table, key, name), unit, signed=signed))
        if any(c.known for c in cells):
            left, right = pair(key)
            grid.rows.append((f"{left} − {right}" if signed and right else key, cells))
    return grid


def _extent(cells: list[Cell]) -> list[float]:
    values = [c.value for c in cells if c.known]
    return [*values, *(x for c in cells if has_interval(c.ci) for x in c.ci)]


def scale_of(cells: list[Cell], what: Term) -> Scale:
    extent = _extent(cells)
    inside = all(0 <= v <= 1 for v in extent)
    return SHARE if what.unit == "share" and inside else Scale.over(extent)


def _set_note(entry: dict[str, Any]) -> str:
    rows = f"{entry['rows']:,} rows" if is_number(entry.get("rows")) else "Rows"
    held = {True: " held out of the source that was in the mix", False: " that were not in the mix at all"}
    origin = f" ({entry['origin']})" if entry.get("origin") else ""
    return f"{rows}{held.get(entry.get('in_mix_source'), '')}{origin}" if entry else ""
