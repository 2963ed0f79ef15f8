"""The table of a study: a line for each point and arm, with scores, losses and costs; and differences of arms."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tell.names import ANSWER_LOSS, arm_order
from tell.names import show as number
from tell.names import show_interval as interval
from tell.names import show_power as power
from tell.report.score_tables import Cell
from tell.studies.labels import arm_name, key_name, metric_term, value_name
from tell.studies.results import Outcome, Study, frozen
from tell.studies.stats.seed_means import Bootstrap, groups
from tell.studies.stats.shared_rows import CHANGE

PROBE = "probe loss"
FLOPS = ("FLOPs", "FLOPs as 6 N D", "FLOPs to answer")
ANY = "any"  # the key has no effect on the arm


@dataclass(frozen=True)
class Line:
    """One line: values of the grid's keys in words, the arm, a cell a metric, and means of what it cost."""

    point: dict[str, str]
    arm: str
    cells: dict[str, Cell]
    seeds: int
    costs: dict[str, float]


@dataclass(frozen=True)
class Gap:
    """``tell`` minus another arm at one point, a cell a metric."""

    point: dict[str, str]
    arm: str
    cells: dict[str, Cell]
    seeds: int


def tabulated(study: Study) -> list[str]:
    """The metrics asked for, the loss of the reference answers, and the loss on general text; each with its change
    from the untuned model, where that was measured."""
    known = study.known()
    names = dict.fromkeys([*study.metrics(), ANSWER_LOSS, PROBE])
    return [own for name in names for own in (name, name + CHANGE) if own in known]


def lines(study: Study, bootstrap: Bootstrap) -> list[Line]:
    """The table, arms in their usual order within each point; an arm's cells stand once, whatever points share them."""
    found = []
    for arm, points, group in merged(study):
        cells = {}
        for metric in tabulated(study):
            draws = bootstrap.of(group, metric)
            signed = metric.endswith(CHANGE)
            cells[metric] = Cell.of(draws.summary() if draws else None, metric_term(metric).unit, signed=signed)
        costs = {key: float(np.mean([o.measured.costs[key] for o in group])) for key in group[0].measured.costs}
        found.append(Line(_shown(study, points), arm, cells, len(group), costs))
    return found


def gaps(study: Study, bootstrap: Bootstrap) -> list[Gap]:
    """``tell`` against every other arm, paired by seed and test row; each pair of cells once."""
    by_point = groups(study.outcomes)
    found: dict[tuple, tuple[list[dict], list[Outcome], list[Outcome]]] = {}
    for (point, arm), group in by_point.items():
        tell = by_point.get((point, "tell"))
        if tell and arm not in ("tell", "tell-anchor"):
            key = (arm, *(o.cell for o in (*tell, *group)))
            found.setdefault(key, ([], tell, group))[0].append(dict(tell[0].point))
    out, metrics = [], dict.fromkeys(name.removesuffix(CHANGE) for name in tabulated(study))
    for (arm, *_), (points, tell, group) in found.items():
        cells = {}
        for metric in metrics:
            unit = metric_term(metric).unit
            gap = bootstrap.difference(tell, group, metric)
            cells[metric] = Cell.of(gap, "points" if unit == "share" else unit, signed=True)
        shared = {o.seed for o in tell} & {o.seed for o in group}
        if shared:
            out.append(Gap(_shown(study, points), arm, cells, len(shared)))
    order = list(dict.fromkeys(tuple(gap.point.values()) for gap in out))
    arms = arm_order([gap.arm for gap in out])
    return sorted(out, key=lambda gap: (order.index(tuple(gap.point.values())), arms.index(gap.arm)))


def merged(study: Study) -> Iterator[tuple[str, list[dict], list[Outcome]]]:
    """(arm, points, outcomes), a group of cells once: first what no key moves, then point by point."""
    found: dict[tuple, tuple[str, list[dict], list[Outcome]]] = {}
    for (_, arm), group in groups(study.outcomes).items():
        key = (arm, *(o.cell for o in group))
        found.setdefault(key, (arm, [], group))[1].append(dict(group[0].point))
    for key, (arm, at, group) in list(found.items()):  # the same cells with fewer seeds, at a point that has no more
        cells = {o.cell for o in group}
        wider = [k for k, (a, _, g) in found.items() if a == arm and cells < {o.cell for o in g}]
        if wider:
            found[wider[0]][1].extend(at)
            del found[key]
    arms = arm_order(study.recipe.get("arms") or [o.arm for o in study.outcomes])
    points = list(dict.fromkeys(frozen(row["point"]) for row in study.rows))

    def place(entry: tuple[str, list[dict], list[Outcome]]) -> tuple:
        arm, at, _ = entry
        return (len(at) == 1, points.index(frozen(at[0])), arms.index(arm) if arm in arms else len(arms))

    yield from sorted(found.values(), key=place)


def _shown(study: Study, points: Sequence[dict]) -> dict[str, str]:
    """Values of the keys that vary; ``any`` where the points of one line differ in it."""
    shown = {}
    for key in keys_shown(study):
        values = {frozen(point.get(key)) for point in points}
        shown[key] = value_name(points[0].get(key), key) if len(values) == 1 else ANY
    return shown


def keys_shown(study: Study) -> list[str]:
    """The keys that vary, but for those whose values all read the same (an ``anchor.txt`` for each data set)."""
    return [key for key in study.keys if len({value_name(row["point"].get(key), key) for row in study.rows}) > 1]


def to_csv(study: Study, table: Sequence[Line]) -> str:
    """A line a point and arm, numbers in full: ``value``, ``low`` and ``high`` of each metric, and costs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    metrics = list(table[0].cells) if table else []
    costs = list(table[0].costs) if table else []
    heads = [f"{m}{end}" for m in metrics for end in ("", " low", " high")]
    writer.writerow([*keys_shown(study), "arm", "seeds", "test rows", *heads, *costs])
    for line in table:
        cells: list[Any] = []
        for cell in line.cells.values():
            cells += [cell.value, *(cell.ci or (None, None))] if cell.known else [None] * 3
        rows = max((cell.n or 0 for cell in line.cells.values()), default=0)
        point = [text.replace(",", "") for text in line.point.values()]
        writer.writerow([*point, line.arm, line.seeds, rows, *cells, *(f"{v:.6g}" for v in line.costs.values())])
    return out.getvalue()


def to_markdown(study: Study, table: Sequence[Line], differences: Sequence[Gap]) -> str:
    """Both tables, with the interval behind each value."""
    metrics = list(table[0].cells) if table else []
    keys = [key_name(key).capitalize() for key in keys_shown(study)]
    heads = [
        *keys,
        "Arm",
        *(metric_term(m).label for m in metrics),
        "Seeds",
        "Steps",
        "Tokens",
        *FLOPS,
    ]
    rows = [
        [
            *line.point.values(),
            line.arm,
            *map(_cell, bare(line.cells)),
            str(line.seeds),
            *costs_shown(line),
        ]
        for line in table
    ]
    text = f"# {study.title}\n\n" + _grid(heads, rows, len(keys) + 1)
    if differences:
        metrics = [m for m, cell in differences[0].cells.items() if any(g.cells[m].known for g in differences)]
        heads = [*keys, "TELL minus", *(metric_term(m).label for m in metrics), "Seeds"]
        rows = [
            [*gap.point.values(), arm_name(gap.arm), *(_cell(gap.cells[m]) for m in metrics), str(gap.seeds)]
            for gap in differences
        ]
        text += "\n## TELL minus the other arms, paired by seed and test row\n\n" + _grid(heads, rows, len(keys) + 1)
    return text


def costs_shown(line: Line) -> list[str]:
    """Steps, tokens and FLOPs of training, counted and as 6 N D, and FLOPs of answering the test rows."""
    costs = line.costs
    trained = (f"{costs['steps']:,.0f}", f"{costs['tokens']:,.0f}", power(costs["flops"]), power(costs["flops_6nd"]))
    return [*(trained if costs["steps"] else ("–",) * 4), power(costs["eval_flops"])]


def bare(cells: Mapping[str, Cell]) -> list[Cell]:
    """The cells of a line; a loss beside its change goes without an interval: the change has the one that matters."""
    return [
        replace(cell, ci=None) if name.endswith(" loss") and f"{name}{CHANGE}" in cells else cell
        for name, cell in cells.items()
    ]


def _cell(cell: Cell) -> str:
    ends = interval(cell.ci, cell.unit, sign=cell.signed)
    return number(cell.value, cell.unit, sign=cell.signed) + (f" [{ends}]" if ends else "")


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    """A Markdown table; the first ``names`` columns are text, the others are set right."""
    marks = ["---"] * names + ["---:"] * (len(heads) - names)
    return "".join(f"| {' | '.join(_plain(cell) for cell in row)} |\n" for row in (heads, marks, *rows))


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
