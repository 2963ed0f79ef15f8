"""Everything a study's folder says: tables, figures, fits and one self-contained page, from whatever is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from markupsafe import Markup

from tell.grid.curves import curves
from tell.grid.figures import draw_curves, draw_maps, save
from tell.grid.inline import inline_svg
from tell.grid.means import Bootstrap, groups
from tell.grid.results import Study, canonical, frozen, read_results
from tell.grid.table import Gap, Line, costs_shown, gaps, lines, to_csv, to_markdown
from tell.grid.words import arm_name, key_name, metric_term, point_name
from tell.report.page import fill
from tell.report.words import ARMS, arm_order
from tell.run import write_text

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
    ("FLOPs", "Floating-point operations of training; beside them, those of answering the test rows."),
)


@dataclass
class Picture:
    """A drawing in the page."""

    svg: Markup
    caption: str = ""


@dataclass
class Row:
    cells: list[Any]
    own: bool = False


@dataclass
class Table:
    """A table in the page: the first ``names`` columns are text, the others numbers (texts, or `Cell`)."""

    title: str
    heads: list[str]
    rows: list[Row]
    names: int = 1
    note: str = ""


@dataclass
class Section:
    """A part of the page."""

    key: str
    title: str
    texts: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def write_study(folder: str | Path) -> Path:
    """Write ``table.csv``, ``table.md``, ``figures/`` and ``index.html`` of a study, each whole or not at all.

    Cells that are not finished are left out and counted on the page, so a study can be read while it runs.

    Returns:
        The page.

    Raises:
        TellError: no ``study.json``, a folder that cannot be written, matplotlib not installed.
    """
    folder = Path(folder)
    study = read_results(folder)
    bootstrap = Bootstrap(study)
    table, differences = lines(study, bootstrap), gaps(study, bootstrap)
    write_text(folder / "table.csv", to_csv(study, table))
    write_text(folder / "table.md", to_markdown(study, table, differences))
    sections = [_figures(study, bootstrap), _tables(study, table, differences)]
    write_text(folder / "index.html", _page(study, [s for s in sections if s.pictures or s.tables or s.texts]))
    return folder / "index.html"


def _figures(study: Study, bootstrap: Bootstrap) -> Section:
    section = Section("figures", "Figures")
    for n, wanted in enumerate(study.recipe.get("figures") or (), 1):
        drawn = (_map if wanted.get("kind") == "map" else _curves)(study, bootstrap, wanted)
        if drawn is not None:
            section.pictures.append(_picture(study, f"figure{n}", *drawn))
    return section


def _curves(study: Study, bootstrap: Bootstrap, wanted: dict[str, Any]) -> tuple[Figure, str] | None:
    x, y, by = wanted["x"], canonical(wanted["y"]), wanted.get("lines") or "arm"
    panels = [
        (heading, found)
        for heading, within in _panels(study, wanted.get("panels"))
        if (found := curves(study, bootstrap, x=x, y=y, within=within))
    ]
    if not panels:
        return None
    title = f"{metric_term(y).label} over {key_name(x)}"
    return draw_curves(panels, x=x, y=y, title=title, lines=by), title


def _map(study: Study, bootstrap: Bootstrap, wanted: dict[str, Any]) -> tuple[Figure, str] | None:
    x, y, metric = wanted["x"], wanted["y"], canonical(wanted["value"])
    outcomes = [o for o in study.outcomes if o.arm == (wanted.get("arm") or "tell")]
    axes = {key: sorted({o.point[key] for o in outcomes}) for key in (x, y)}
    panels = []
    for heading, within in _panels(study, wanted.get("panels")):
        values = np.full((len(axes[y]), len(axes[x])), np.nan)
        intervals = np.full((*values.shape, 2), np.nan)
        for group in groups(outcomes).values():
            point = group[0].point
            draws = bootstrap.of(group, metric)
            if draws is None or any(frozen(point.get(k)) != frozen(v) for k, v in within.items()):
                continue
            at = axes[y].index(point[y]), axes[x].index(point[x])
            values[at], intervals[at] = draws.value, draws.summary()["ci"]
        if np.isfinite(values).any():
            panels.append((heading, values, intervals))
    if not panels:
        return None
    title = metric_term(metric).label
    return draw_maps(panels, x=(x, axes[x]), y=(y, axes[y]), value=metric, title=title), title


def _panels(study: Study, key: str | None) -> list[tuple[str, dict[str, Any]]]:
    """(heading, values that its points have) of each panel."""
    if key is None:
        return [("", {})]
    values = {frozen(o.point.get(key)): o.point.get(key) for o in study.outcomes}
    return [(point_name({key: value}), {key: value}) for value in values.values()]


def _picture(study: Study, name: str, figure: Figure, title: str, caption: str = "") -> Picture:
    stem = study.folder / "figures" / name
    save(figure, stem)
    return Picture(inline_svg(stem.with_suffix(".svg").read_text(encoding="utf-8"), key=name, title=title), caption)


def _tables(study: Study, table: Sequence[Line], differences: Sequence[Gap]) -> Section:
    section = Section("scores", "Scores, and what they cost")
    keys = [key_name(key).capitalize() for key in study.keys]
    if table:
        section.tables.append(
            Table(
                "",
                [*keys, "Arm", *(metric_term(m).label for m in table[0].cells), "Seeds", *COSTS],
                [
                    Row(
                        [*line.point.values(), line.arm, *line.cells.values(), str(line.seeds), *costs_shown(line)],
                        line.arm == "tell",
                    )
                    for line in table
                ],
                len(keys) + 1,
                "“any”: the key has no effect on this arm.",
            )
        )
    if differences:
        metrics = [m for m in differences[0].cells if any(g.cells[m].known for g in differences)]
        section.tables.append(
            Table(
                "TELL minus the other arms",
                [*keys, "TELL minus", *(metric_term(m).label for m in metrics), "Seeds"],
                [
                    Row([*g.point.values(), arm_name(g.arm), *(g.cells[m] for m in metrics), str(g.seeds)])
                    for g in differences
                ],
                len(keys) + 1,
                "Paired by seed and test row. Where an interval holds 0, the two cannot be told apart.",
            )
        )
    return section


COSTS = ("Steps", "Tokens", "FLOPs", "FLOPs to answer")


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
