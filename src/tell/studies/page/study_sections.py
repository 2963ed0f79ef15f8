"""The parts of a study's page: pictures, tables and findings, as blocks for the template."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from tell.files import atomic_path
from tell.names import show as number
from tell.report.score_tables import Cell
from tell.studies.labels import arm_name, key_name, metric_term, point_name, rounded, value_name
from tell.studies.page.drawing import save
from tell.studies.page.figures import draw_curves, draw_front, draw_maps
from tell.studies.page.inline import inline_svg
from tell.studies.results import Study, as_drawn, frozen
from tell.studies.separation_cells import pictures
from tell.studies.stats.analyses import Analyses, panels
from tell.studies.stats.curve_fit import NAMES
from tell.studies.stats.curves import curves
from tell.studies.stats.results_table import FLOPS, Gap, Line, bare, costs_shown, keys_shown
from tell.studies.stats.seed_means import Bootstrap, groups
from tell.studies.stats.shared_rows import CHANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS = ("Steps", "Tokens", *FLOPS)


@dataclass
class Picture:
    """A drawing in the page; ``name`` is that of its files, without their endings."""

    name: str
    svg: Markup


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


def figures_blocks(study: Study, bootstrap: Bootstrap, found: Analyses) -> Iterator[Picture]:
    for n, asked in enumerate(study.recipe.get("figures") or (), 1):
        drawn = _map(study, bootstrap, asked) if asked.get("kind") == "map" else _curves(study, bootstrap, found, asked)
        if drawn is not None:
            yield _picture(study, f"figure{n}", *drawn)


def _curves(study: Study, bootstrap: Bootstrap, found: Analyses, asked: dict[str, Any]) -> tuple[Figure, str] | None:
    x, by = asked["x"], asked.get("lines") or "arm"
    shown = as_drawn(study, asked["y"])
    drawn = [
        (heading, lines)
        for heading, within in panels(study, asked.get("panels"))
        if (lines := curves(study, bootstrap, x=x, y=shown, within=within))
    ]
    if not drawn:
        return None
    # A panel of nothing but level lines has no cell of its own yet.
    drawn = [entry for entry in drawn if not all(line.flat for line in entry[1])] or drawn
    marks = [[mark for line in lines if (mark := found.mark(line, x, shown)) is not None] for _, lines in drawn]
    title = f"{metric_term(shown).label} over {key_name(x)}"
    return draw_curves(drawn, x=x, y=shown, title=title, lines=by, marks=marks), title


def _map(study: Study, bootstrap: Bootstrap, asked: dict[str, Any]) -> tuple[Figure, str] | None:
    """A panel for each value of every other key that varies, whether ``panels`` names it or not."""
    x, y, metric = asked["x"], asked["y"], as_drawn(study, asked["value"])
    arm = asked.get("arm") or "tell"
    found = [g for g in groups(o for o in study.outcomes if o.arm == arm).values() if {x, y} <= g[0].point.keys()]
    axes = {key: sorted({g[0].point[key] for g in found}, key=lambda v: (v is None, v)) for key in (x, y)}
    contexts: dict[str, tuple[dict[str, Any], np.ndarray, np.ndarray]] = {}
    for group in found:
        point, draws = group[0].point, bootstrap.of(group, metric)
        if draws is None:
            continue
        context = {key: point.get(key) for key in study.keys if key not in (x, y)}
        empty = np.full((len(axes[y]), len(axes[x])), np.nan)
        _, values, intervals = contexts.setdefault(
            frozen(context), (context, empty, np.full((*empty.shape, 2), np.nan))
        )
        at = axes[y].index(point[y]), axes[x].index(point[x])
        values[at], intervals[at] = draws.value, draws.summary()["ci"]
    drawn = [(point_name(context), *numbers) for context, *numbers in contexts.values()]
    title = f"{metric_term(metric).label}, {arm_name(arm)}"
    return (draw_maps(drawn, x=(x, axes[x]), y=(y, axes[y]), value=metric, title=title), title) if drawn else None


def separation_blocks(study: Study) -> Iterator[str | Picture]:
    """The t-SNE picture of each point, of the first seed."""
    shown = keys_shown(study)
    for n, (point, path) in enumerate(pictures(study), 1):
        point = {key: value for key, value in point.items() if key in shown}
        stem = study.folder / "figures" / f"figure-states{n}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        for kind in ("svg", "png"):
            with atomic_path(stem.with_suffix(f".{kind}")) as temporary:
                shutil.copyfile(path.with_suffix(f".{kind}"), temporary)
        svg = inline_svg(path.read_text(encoding="utf-8"), key=stem.name, title=f"t-SNE: {point_name(point)}")
        yield from filter(None, [point_name(point)])
        yield Picture(stem.name, svg)


def fronts_blocks(study: Study, bootstrap: Bootstrap, found: Analyses) -> Iterator[str | Picture | Table]:
    asked = list(dict.fromkeys((entry["gain"], entry["cost"]) for entry in found.pareto))
    for n, (gain, cost) in enumerate(asked, 1):
        entries = [e for e in found.pareto if (e["gain"], e["cost"]) == (gain, cost)]
        title = f"{metric_term(gain).label} against {metric_term(cost).label[0].lower()}{metric_term(cost).label[1:]}"
        figure = draw_front([(e["heading"], e["points"]) for e in entries], gain=gain, cost=cost, title=title)
        yield _picture(study, f"front{n}", figure, title)
        yield from _maps(study, bootstrap, f"front{n}-map", (gain, cost), entries[0]["where"])
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


def _maps(
    study: Study, bootstrap: Bootstrap, name: str, metrics: Sequence[str], within: dict[str, Any]
) -> Iterator[Picture]:
    """Gain and cost of TELL as maps, where two keys that are numbers set the points of a front apart."""
    keys = [key for key in study.keys if key not in within]
    numeric = all(isinstance(o.point.get(key), int | float) for o in study.outcomes for key in keys)
    if len(keys) == 2 and numeric:
        x, y = sorted(keys, key=lambda key: not key.startswith("general."))
        for n, metric in enumerate(metrics, 1):
            drawn = _map(study, bootstrap, {"x": x, "y": y, "value": metric})
            if drawn is not None:
                yield _picture(study, f"{name}{n}", *drawn)


def fits_blocks(found: Analyses) -> Iterator[str | Table]:
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
            turn = "Takes off" if fit["improves"] else "Gets worse from"
            heads = ["", "Floor", "Ceiling", "Slope, per decade", "Middle", turn]
            yield Table("", heads, [Row(["S-curve", *shown])], 1)


def _amount(cell: Cell) -> str:
    low, high = map(rounded, cell.ci)
    return f"{rounded(cell.value)} [{low} to {high}]"


def efficiency_blocks(found: Analyses) -> Iterator[str | Table]:
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


def flips_blocks(found: Analyses) -> Iterator[str | Table]:
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
            note += (
                f" Entropy of where they turn: {bits:.2f} bits; a line in the logarithm would give {even:.2f}, rows "
                f"shuffled {entry['entropy_by_chance'] or 0.0:.2f}."
            )
        yield Table("", heads, rows, 1, note)


def _named(entry: dict[str, Any]) -> str:
    """Metric, arm and where, as the head of a verdict."""
    arm = arm_name(entry["arm"]) if "arm" in entry else ""
    parts = [metric_term(entry["y"]).label, f"over {key_name(entry['x'])}", arm and f"({arm})"]
    return ", ".join(filter(None, (" ".join(filter(None, parts)), point_name(entry["where"]), entry["compared"])))


def _picture(study: Study, name: str, figure: Figure, title: str) -> Picture:
    stem = study.folder / "figures" / name
    save(figure, stem)
    return Picture(name, inline_svg(stem.with_suffix(".svg").read_text(encoding="utf-8"), key=name, title=title))


def tables_blocks(study: Study, table: Sequence[Line], differences: Sequence[Gap]) -> Iterator[Table]:
    keys = [key_name(key).capitalize() for key in keys_shown(study)]
    if table:
        heads = [*keys, "Arm", *(metric_term(m).label for m in table[0].cells), "Seeds", *COSTS]
        rows = [
            Row(
                [*line.point.values(), line.arm, *bare(line.cells), str(line.seeds), *costs_shown(line)],
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
        if study.without_general_rows():
            note += (
                " Some runs have not kept what each row of general text lost: there each side's change is taken by "
                "itself, which makes the interval wide rather than narrow."
            )
        yield Table("TELL minus the other arms", heads, rows, len(keys) + 1, note)
