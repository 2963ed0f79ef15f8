"""The sections of a study's page, in order: texts, pictures and tables as blocks for the template."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tell.files import atomic_path
from tell.metric_names import CHANGE, metric
from tell.number_text import show
from tell.registry import Registry
from tell.report.score_tables import Cell
from tell.studies.labels import arm_name, key_name, point_name, rounded, value_name
from tell.studies.page.drawing import save
from tell.studies.page.figure_kinds import Contents, figure, map_figure
from tell.studies.page.figures import draw_front
from tell.studies.page.inline import inline_svg
from tell.studies.results import Study
from tell.studies.separation_cells import pictures
from tell.studies.stats.curve_fit import NAMES
from tell.studies.stats.results_table import Table, gaps_of, keys_shown, table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


STATES = "figure-states"  # and a number: names of the pictures of hidden states


@dataclass
class Picture:
    """A drawing in the page; ``name`` is that of its files, without their suffix."""

    name: str
    svg: Markup


Block = str | Picture | Table
Blocks = Callable[[Contents], Iterator[Block]]


@dataclass
class Section:
    """A part of the page; empty ones are left out."""

    key: str
    title: str
    blocks: Sequence[Block]


_section = Registry[tuple[str, Blocks]]("section")


def section(key: str, title: str) -> Callable[[Blocks], Blocks]:
    """Register the blocks of a section, in the order of the page."""
    return lambda blocks: _section(key)((title, blocks))[1]


def sections(page: Contents) -> list[Section]:
    """All sections of a page; their pictures are written to ``figures/``."""
    return [Section(key, title, list(blocks(page))) for key, (title, blocks) in _section.items()]


@section("figures", "Figures")
def _figures(page: Contents) -> Iterator[Block]:
    for n, asked in enumerate(page.study.recipe.get("figures") or (), 1):
        drawn = figure[asked.get("kind") or "curves"](page, asked)
        if drawn is not None:
            yield _picture(page.study, f"figure{n}", *drawn)


@section("separation", "Hidden states")
def _separation(page: Contents) -> Iterator[Block]:
    """The t-SNE picture of each point, of the first seed."""
    shown = keys_shown(page.study)
    for n, (point, path) in enumerate(pictures(page.study), 1):
        if path is None:
            continue
        name = point_name({key: value for key, value in point.items() if key in shown})
        stem = page.study.folder / "figures" / f"{STATES}{n}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        for kind in ("svg", "png"):
            with atomic_path(stem.with_suffix(f".{kind}")) as temporary:
                shutil.copyfile(path.with_suffix(f".{kind}"), temporary)
        if name:
            yield name
        yield Picture(stem.name, inline_svg(path.read_text(encoding="utf-8"), key=stem.name, title=f"t-SNE: {name}"))


@section("shape", "Shape of the curves")
def _fits(page: Contents) -> Iterator[Block]:
    for fit in page.found.entries["fits"]:
        yield f"{_named(fit)}. {fit['verdict']}"
        if "held_out_error" not in fit:
            continue
        errors, against, spec = fit["held_out_error"], fit.get("against", {}), metric(fit["y"])
        yield Table(
            "",
            ["Shape", "Held-out error", "More than the S-curve's"],
            [
                [
                    NAMES[shape][0].upper() + NAMES[shape][1:],
                    Cell.of(error, spec.gap_unit),
                    Cell.of(against.get(shape), spec.gap_unit, signed=True),
                ]
                for shape, error in errors.items()
            ],
        )
        if "logistic" in fit:
            found, turn = fit["logistic"], "Takes off" if fit["improves"] else "Gets worse from"
            heads = ["", "Floor", "Ceiling", "Slope, per decade", "Middle", turn]
            levels = [Cell.of(found[key], spec.unit) for key in ("floor", "ceiling")]
            middle, threshold = (_amount(found[key]) for key in ("middle", "threshold"))
            yield Table("", heads, [["S-curve", *levels, Cell.of(found["slope"], "plain"), middle, threshold]])


def _amount(entry: Mapping[str, Any]) -> str:
    low, high = map(rounded, entry["ci"])
    return f"{rounded(entry['value'])} [{low} to {high}]"


@section("efficiency", "Amounts for the same score")
def _efficiency(page: Contents) -> Iterator[Block]:
    for entry in page.found.entries["efficiency"]:
        yield f"{_named(entry)}. {entry['verdict']}"
        spec, arms, factors = metric(entry["y"]), entry["arms"], entry["factors"]
        heads = [spec.label, *map(arm_name, arms), *(f"{arm_name(arm)}: factor" for arm in factors)]
        rows: list[list[str | Cell]] = []
        for i, level in enumerate(entry["levels"]):
            needs = [_reached(arm["amounts"][i], arm["ci"][i], "{:,.0f}") for arm in arms.values()]
            times = [_reached(f["by_level"][i]["factor"], f["by_level"][i]["ci"], "{:.2g}") for f in factors.values()]
            rows.append([show(level, spec.unit), *needs, *times])
        key = key_name(entry["x"]).capitalize()
        yield Table("", heads, rows, 1, f"{key} for each score; “–” is not reached with the largest amount measured.")


def _reached(value: float | None, ci: Sequence[float | None], form: str) -> str:
    ends = [form.format(end) if end is not None else "–" for end in ci]
    return f"{form.format(value)} [{ends[0]} to {ends[1]}]" if value is not None else "–"


@section("front", "Gain against cost")
def _fronts(page: Contents) -> Iterator[Block]:
    asked = list(dict.fromkeys((entry["gain"], entry["cost"]) for entry in page.found.entries["pareto"]))
    for n, (gain, cost) in enumerate(asked, 1):
        entries = [e for e in page.found.entries["pareto"] if (e["gain"], e["cost"]) == (gain, cost)]
        label = metric(cost).label
        title = f"{metric(gain).label} against {label[0].lower()}{label[1:]}"
        drawn = draw_front([(e["heading"], e["points"]) for e in entries], gain=gain, cost=cost, title=title)
        yield _picture(page.study, f"front{n}", drawn, title)
        yield from _maps(page, f"front{n}-map", (gain, cost), entries[0]["where"])
        for entry in entries:
            yield ": ".join(filter(None, (entry["heading"], entry["verdict"])))
        for entry in entries:
            heads = ["Point", metric(gain).label, label, "On the front in"]
            rows: list[list[str | Cell]] = [
                [
                    point["name"],
                    Cell.of(point["gain"], metric(gain).unit),
                    Cell.of(point["cost"], metric(cost).unit, signed=CHANGE in cost),
                    show(point["front_share"], "share"),
                ]
                for point in entry["points"]
                if point["on_front"] or point["front_share"] >= 0.05
            ]
            note = "Points that are on the front in at least 5 % of the resamples."
            yield Table(entry["heading"] or "The front", heads, rows, 1, note)


def _maps(page: Contents, name: str, metrics: Sequence[str], within: Mapping[str, object]) -> Iterator[Picture]:
    """Gain and cost of TELL as maps, where the points of a front differ in two keys that are numbers."""
    keys = [key for key in page.study.keys if key not in within]
    numeric = all(isinstance(o.point.get(key), int | float) for o in page.study.outcomes for key in keys)
    if len(keys) == 2 and numeric:
        x, y = sorted(keys, key=lambda key: not key.startswith("general."))
        for n, value in enumerate(metrics, 1):
            drawn = map_figure(page, {"x": x, "y": y, "value": value})
            if drawn is not None:
                yield _picture(page.study, f"{name}{n}", *drawn)


@section("rows", "Row by row")
def _flips(page: Contents) -> Iterator[Block]:
    for entry in page.found.entries["flips"]:
        yield f"{_named(entry)}. {entry['verdict']}"
        amounts = [value_name(amount) for amount in entry["amounts"]]
        rows: list[list[str | Cell]] = [
            [
                seed,
                *(str(facts["turn_at"].get(amount, "–")) for amount in amounts),
                str(facts["never"]),
                str(facts["back"]),
                Cell.of(facts["back_by_chance"], "score"),
            ]
            for seed, facts in entry["seeds"].items()
        ]
        note = f"Test rows by the {key_name(entry['x'])} from which they stay right."
        if entry["entropy"] is not None and entry["even_entropy"] is not None:
            note += (
                f" Entropy of where they turn: {entry['entropy']:.2f} bits; a line in the logarithm would give "
                f"{entry['even_entropy']:.2f}, rows shuffled {entry['entropy_by_chance'] or 0.0:.2f}."
            )
        yield Table("", ["Seed", *amounts, "Never", "Flips back", "if shuffled"], rows, 1, note)


@section("scores", "Scores, and what they cost")
def _tables(page: Contents) -> Iterator[Block]:
    if page.table:
        yield table_of(page.study, page.table)
    if page.gaps:
        yield gaps_of(page.study, page.gaps)


def _named(entry: Mapping[str, Any]) -> str:
    """Metric, arm and context, as the head of a verdict."""
    arm = f" ({arm_name(entry['arm'])})" if "arm" in entry else ""
    head = f"{metric(entry['y']).label} over {key_name(entry['x'])}{arm}"
    return ", ".join(filter(None, (head, point_name(entry["where"]), entry["compared"])))


def _picture(study: Study, name: str, figure: Figure, title: str) -> Picture:
    stem = study.folder / "figures" / name
    save(figure, stem)
    return Picture(name, inline_svg(stem.with_suffix(".svg").read_text(encoding="utf-8"), key=name, title=title))
