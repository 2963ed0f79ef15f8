"""Everything a study's folder says: tables, figures, fits and one self-contained page, from whatever is finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from markupsafe import Markup

from tell.grid.analyses import Analyses, analyse, panels
from tell.grid.curves import curves
from tell.grid.drawing import save
from tell.grid.figures import draw_curves, draw_front, draw_maps
from tell.grid.fit import NAMES
from tell.grid.inline import inline_svg
from tell.grid.means import Bootstrap, groups
from tell.grid.results import CHANGE, Study, canonical, frozen, read_results
from tell.grid.table import Gap, Line, costs_shown, gaps, lines, to_csv, to_markdown
from tell.grid.words import arm_name, key_name, metric_term, point_name, rounded, value_name
from tell.report.page import fill
from tell.report.scores import Cell
from tell.report.text import number
from tell.report.words import ARMS, arm_order
from tell.run import write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = (
    (
        "interval",
        "Where the value would lie in 95 of 100 repetitions with other seeds and other test rows of the same kind, by "
        "a bootstrap over both. A seed decides the training rows, their order, the test rows and the decoding. Three "
        "seeds show little of how much seeds differ: take intervals over seeds as too narrow rather than too wide.",
    ),
    ("difference", "TELL minus the other arm, paired by seed and test row; shares in percentage points."),
    (
        "held-out error",
        "How far a shape fitted to all other amounts misses the mean at one left out; root mean square over the "
        "amounts. Its interval covers seeds and test rows, not the choice of amounts.",
    ),
    (
        "takes off",
        "Where the tangent at the steepest point of the fitted S-curve leaves its floor (the end of the lag phase; "
        "Zwietering et al. 1990).",
    ),
    ("front", "The points that no other equals or beats in both gain and cost."),
    ("FLOPs", "Floating-point operations of training; beside them, those of answering the test rows."),
)
COSTS = ("Steps", "Tokens", "FLOPs", "FLOPs to answer")


@dataclass
class Picture:
    """A drawing in the page."""

    svg: Markup
    caption: str = ""


@dataclass
class Row:
    """A row of a table: texts, or `Cell`; ``own`` sets it off."""

    cells: list[Any]
    own: bool = False


@dataclass
class Table:
    """A table in the page: the first ``names`` columns are text, the others numbers."""

    title: str
    heads: list[str]
    rows: list[Row]
    names: int = 1
    note: str = ""


@dataclass
class Section:
    """A part of the page; ``blocks`` are texts, pictures and tables in their order."""

    key: str
    title: str
    blocks: Sequence[str | Picture | Table]


def write_study(folder: str | Path) -> Path:
    """Write everything a study says, each file whole or not at all: ``table.csv``, ``table.md``, ``fits.json``,
    ``efficiency.json``, ``flips.json``, ``pareto.json``, ``figures/`` and ``index.html``.

    Cells that are not finished are left out and counted on the page, so a study can be read while it runs.

    Returns:
        The page.

    Raises:
        TellError: no ``study.json``, a folder that cannot be written, or matplotlib, scipy or scikit-learn missing.
    """
    folder = Path(folder)
    study = read_results(folder)
    bootstrap = Bootstrap(study)
    found = analyse(study, bootstrap)
    table, differences = lines(study, bootstrap), gaps(study, bootstrap)
    write_text(folder / "table.csv", to_csv(study, table))
    write_text(folder / "table.md", to_markdown(study, table, differences))
    for name in ("fits", "efficiency", "flips", "pareto"):
        write_json(folder / f"{name}.json", getattr(found, name))
    sections = [
        Section("figures", "Figures", list(_figures(study, bootstrap, found))),
        Section("shape", "Shape of the curves", list(_fits(found))),
        Section("efficiency", "Amounts for the same score", list(_efficiency(found))),
        Section("front", "Gain against cost", list(_fronts(study, found))),
        Section("rows", "Row by row", list(_flips(found))),
        Section("scores", "Scores, and what they cost", list(_tables(study, table, differences))),
    ]
    write_text(folder / "index.html", _page(study, [s for s in sections if s.blocks]))
    return folder / "index.html"


def _figures(study: Study, bootstrap: Bootstrap, found: Analyses) -> Iterator[Picture]:
    for n, asked in enumerate(study.recipe.get("figures") or (), 1):
        drawn = _map(study, bootstrap, asked) if asked.get("kind") == "map" else _curves(study, bootstrap, found, asked)
        if drawn is not None:
            yield _picture(study, f"figure{n}", *drawn)


def _curves(study: Study, bootstrap: Bootstrap, found: Analyses, asked: dict[str, Any]) -> tuple[Figure, str] | None:
    x, y, by = asked["x"], canonical(asked["y"]), asked.get("lines") or "arm"
    shown = _as_change(study, y)
    drawn = [
        (heading, lines)
        for heading, within in panels(study, asked.get("panels"))
        if (lines := curves(study, bootstrap, x=x, y=shown, within=within))
    ]
    if not drawn:
        return None
    marks = [[mark for line in lines if (mark := found.mark(line, x, y)) is not None] for _, lines in drawn]
    title = f"{metric_term(shown).label} over {key_name(x)}"
    return draw_curves(drawn, x=x, y=shown, title=title, lines=by, marks=marks), title


def _map(study: Study, bootstrap: Bootstrap, asked: dict[str, Any]) -> tuple[Figure, str] | None:
    x, y, metric = asked["x"], asked["y"], _as_change(study, canonical(asked["value"]))
    arm = asked.get("arm") or "tell"
    outcomes = [o for o in study.outcomes if o.arm == arm]
    axes = {key: sorted({o.point[key] for o in outcomes}) for key in (x, y)}
    drawn = []
    for heading, within in panels(study, asked.get("panels")):
        values = np.full((len(axes[y]), len(axes[x])), np.nan)
        intervals = np.full((*values.shape, 2), np.nan)
        for group in groups(outcomes).values():
            point = group[0].point
            draws = bootstrap.of(group, metric)
            if draws is not None and all(frozen(point.get(k)) == frozen(v) for k, v in within.items()):
                at = axes[y].index(point[y]), axes[x].index(point[x])
                values[at], intervals[at] = draws.value, draws.summary()["ci"]
        if np.isfinite(values).any():
            drawn.append((heading, values, intervals))
    title = f"{metric_term(metric).label}, {arm_name(arm)}"
    return (draw_maps(drawn, x=(x, axes[x]), y=(y, axes[y]), value=metric, title=title), title) if drawn else None


def _as_change(study: Study, metric: str) -> str:
    """A loss on general text is drawn as its change from the untuned model, which has the interval that matters."""
    known = any(metric + CHANGE in o.measured.numbers for o in study.outcomes)
    return metric + CHANGE if known else metric


def _fronts(study: Study, found: Analyses) -> Iterator[str | Picture | Table]:
    asked = list(dict.fromkeys((entry["gain"], entry["cost"]) for entry in found.pareto))
    for n, (gain, cost) in enumerate(asked, 1):
        entries = [e for e in found.pareto if (e["gain"], e["cost"]) == (gain, cost)]
        cost = _as_change(study, cost)
        title = f"{metric_term(gain).label} against {metric_term(cost).label[0].lower()}{metric_term(cost).label[1:]}"
        figure = draw_front([(e["heading"], e["points"]) for e in entries], gain=gain, cost=cost, title=title)
        yield _picture(study, f"front{n}", figure, title)
        for entry in entries:
            yield ": ".join(filter(None, (entry["heading"], entry["verdict"])))
        for entry in entries:
            units = [(key, metric_term(name)) for key, name in (("gain", gain), ("cost", cost))]
            rows = [
                Row(
                    [
                        point["name"],
                        *(
                            Cell.of(point[key], what.unit, signed=key == "cost" and CHANGE in cost)
                            for key, what in units
                        ),
                        number(point["front_share"], "share"),
                    ]
                )
                for point in entry["points"]
                if point["on_front"] or point["front_share"] >= 0.05
            ]
            heads = ["Point", *(what.label for _, what in units), "On the front in"]
            note = "Points that are on the front in at least 5 % of the resamples."
            yield Table(entry["heading"] or "The front", heads, rows, 1, note)


def _fits(found: Analyses) -> Iterator[str | Table]:
    for fit in found.fits:
        name = _named(fit)
        yield f"{name}. {fit['verdict']}"
        if "held_out_error" not in fit:
            continue
        errors, against, unit = fit["held_out_error"], fit.get("against", {}), metric_term(fit["y"]).unit
        unit = "points" if unit == "share" else unit
        rows = [
            Row([NAMES[k][0].upper() + NAMES[k][1:], Cell.of(v, unit), Cell.of(against.get(k), unit, signed=True)])
            for k, v in errors.items()
        ]
        yield Table("", ["Shape", "Held-out error", "More than the S-curve's"], rows, 1)
        if "logistic" in fit:
            keys = ("floor", "ceiling", "slope", "middle", "threshold")
            units = [metric_term(fit["y"]).unit] * 2 + ["plain"] * 3
            cells = [Cell.of(fit["logistic"][k], u) for k, u in zip(keys, units, strict=True)]
            shown = [_amount(c) if k in ("middle", "threshold") else c for k, c in zip(keys, cells, strict=True)]
            heads = ["", "Floor", "Ceiling", "Slope, per decade", "Middle", "Takes off"]
            yield Table("", heads, [Row(["S-curve", *shown])], 1)


def _amount(cell: Cell) -> str:
    low, high = map(rounded, cell.ci)
    return f"{rounded(cell.value)} [{low} to {high}]"


def _efficiency(found: Analyses) -> Iterator[str | Table]:
    for entry in found.efficiency:
        yield f"{_named(entry)}. {entry['verdict']}"
        unit, arms, factors = metric_term(entry["y"]).unit, entry["arms"], entry["factors"]
        heads = [
            metric_term(entry["y"]).label,
            *(arm_name(a) for a in arms),
            *(f"{arm_name(a)}: factor" for a in factors),
        ]
        rows = []
        for i, level in enumerate(entry["levels"]):
            needs = [_reached(a["amounts"][i], a["ci"][i], "{:,.0f}") for a in arms.values()]
            times = [_reached(f["by_level"][i]["factor"], f["by_level"][i]["ci"], "{:.2g}") for f in factors.values()]
            rows.append(Row([number(level, unit), *needs, *times]))
        note = (
            f"{key_name(entry['x']).capitalize()} for each score; “–” is not reached with the largest amount measured."
        )
        yield Table("", heads, rows, 1, note)


def _reached(value: float | None, ci: Sequence[float | None], form: str) -> str:
    ends = [form.format(end) if end is not None else "–" for end in ci]
    return f"{form.format(value)} [{ends[0]} to {ends[1]}]" if value is not None else "–"


def _flips(found: Analyses) -> Iterator[str | Table]:
    for entry in found.flips:
        yield f"{_named(entry)}. {entry['verdict']}"
        heads = ["Seed", *map(value_name, entry["amounts"]), "Never", "Flips back", "if shuffled"]
        rows = [
            Row(
                [
                    seed,
                    *(str(facts["turn_at"].get(value_name(v), "–")) for v in entry["amounts"]),
                    str(facts["never"]),
                    str(facts["back"]),
                    Cell.of(facts["back_by_chance"], "score"),
                ]
            )
            for seed, facts in entry["seeds"].items()
        ]
        note = f"Test rows by the {key_name(entry['x'])} from which they stay right."
        if entry["entropy"] is not None and entry["even_entropy"] is not None:
            bits, even = entry["entropy"], entry["even_entropy"]
            note += f" Entropy of where they turn: {bits:.2f} bits; a line in the logarithm would give {even:.2f}."
        yield Table("", heads, rows, 1, note)


def _named(entry: dict[str, Any]) -> str:
    """Metric, arm and where, as the head of a verdict."""
    arm = arm_name(entry["arm"]) if "arm" in entry else ""
    parts = [metric_term(entry["y"]).label, f"over {key_name(entry['x'])}", arm and f"({arm})"]
    where = point_name(entry["where"])
    return " ".join(filter(None, parts)) + (f", {where}" if where else "")


def _picture(study: Study, name: str, figure: Figure, title: str) -> Picture:
    stem = study.folder / "figures" / name
    save(figure, stem)
    return Picture(inline_svg(stem.with_suffix(".svg").read_text(encoding="utf-8"), key=name, title=title))


def _tables(study: Study, table: Sequence[Line], differences: Sequence[Gap]) -> Iterator[Table]:
    keys = [key_name(key).capitalize() for key in study.keys]
    if table:
        heads = [*keys, "Arm", *(metric_term(m).label for m in table[0].cells), "Seeds", *COSTS]
        rows = [
            Row(
                [*line.point.values(), line.arm, *_bare(line.cells), str(line.seeds), *costs_shown(line)],
                line.arm == "tell",
            )
            for line in table
        ]
        yield Table("", heads, rows, len(keys) + 1, "“any”: the key has no effect on this arm.")
    if differences:
        metrics = [m for m in differences[0].cells if any(g.cells[m].known for g in differences)]
        heads = [*keys, "TELL minus", *(metric_term(m).label for m in metrics), "Seeds"]
        rows = [
            Row([*g.point.values(), arm_name(g.arm), *(g.cells[m] for m in metrics), str(g.seeds)]) for g in differences
        ]
        note = "Paired by seed and test row. Where an interval holds 0, the two cannot be told apart."
        yield Table("TELL minus the other arms", heads, rows, len(keys) + 1, note)


def _bare(cells: dict[str, Cell]) -> list[Cell]:
    """Cells of a line; a level beside its change goes without an interval."""
    return [Cell(c.value, None, c.n, c.unit) if f"{m}{CHANGE}" in cells else c for m, c in cells.items()]


def _page(study: Study, sections: Sequence[Section]) -> str:
    arms = arm_order([row["arm"] for row in study.rows])
    metrics = [metric_term(m) for m in study.metrics()]
    return fill(
        "study.html.j2",
        title=study.title,
        claim=study.claim,
        missing=missing(study),
        failed=sorted(study.failed.items()),
        facts=[
            ("Cells", f"{study.states['done']} of {study.states.total()} finished"),
            ("Seeds", ", ".join(str(s) for s in sorted({row["seed"] for row in study.rows}))),
            ("Begun", study.created),
        ],
        sections=sections,
        words=[
            *((t.label, t.definition) for t in metrics),
            *((a, f"{arm_name(a)}. {ARMS[a][1]}") for a in arms if a in ARMS),
            *WORDS,
        ],
        recipe=yaml.safe_dump(study.recipe, sort_keys=False, allow_unicode=True),
    )


def missing(study: Study) -> str:
    """What has no numbers yet, in a sentence; empty where nothing is missing."""
    parts = [f"{count} {state}" for state, count in study.missing.items()]
    return f"Of {len(study.rows)} rows of the study, {', '.join(parts)}." if parts else ""
