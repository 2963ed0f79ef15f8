"""The table of a study: a line for each point and arm, with scores, losses and costs; and differences of arms."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tell.metric_names import ANSWER_LOSS, CHANGE, LOSS, PROBE, metric
from tell.names import arm_order
from tell.number_text import has_interval, show, show_interval, show_power
from tell.report.score_tables import Cell
from tell.run.answers import adapter_arm
from tell.studies.labels import arm_name, key_name, value_name
from tell.studies.results import Outcome, Study, frozen
from tell.studies.stats.seed_means import Bootstrap, groups

FLOPS = ("FLOPs", "FLOPs as 6 N D", "FLOPs to answer")
ANY = "any"  # the key has no effect on the arm


@dataclass(frozen=True)
class Line:
    """One line: values of the grid's keys in words, the arm (or the one compared with ``tell``), its cells by metric,
    and mean costs."""

    point: dict[str, str]
    arm: str
    cells: dict[str, Cell]
    seeds: int
    costs: dict[str, float] = field(default_factory=dict)


@dataclass
class Table:
    """A table as it is shown: the first ``names`` columns are text, the others numbers; ``own`` marks TELL's rows."""

    title: str
    heads: list[str]
    rows: list[list[str | Cell]]
    names: int = 1
    note: str = ""
    own: list[bool] = field(default_factory=list)


def tabulated(study: Study) -> list[str]:
    """The requested metrics, the loss of the reference answers, and the loss on general text; each with its change
    from the untuned model, where that was measured."""
    known = study.known()
    names = dict.fromkeys([*study.metrics(), ANSWER_LOSS, PROBE + LOSS])
    return [own for name in names for own in (name, name + CHANGE) if own in known]


def lines(study: Study, bootstrap: Bootstrap) -> list[Line]:
    """The table, arms in their usual order within each point; an arm's cells once, whatever points share them."""
    found = []
    for arm, points, group in merged(study):
        cells = {}
        for name in tabulated(study):
            draws = bootstrap.of(group, name)
            signed = name.endswith(CHANGE)
            cells[name] = Cell.of(draws.summary() if draws else None, metric(name).unit, signed=signed)
        costs = {key: float(np.mean([o.measured.costs[key] for o in group])) for key in group[0].measured.costs}
        found.append(Line(_shown(study, points), arm, cells, len(group), costs))
    return found


def gaps(study: Study, bootstrap: Bootstrap) -> list[Line]:
    """``tell`` minus every other arm, paired by seed and test row; each pair of cells once."""
    by_point = groups(study.outcomes)
    found: dict[tuple, tuple[list[dict], list[Outcome], list[Outcome]]] = {}
    for (point, arm), group in by_point.items():
        tell = by_point.get((point, "tell"))
        if tell and adapter_arm(arm) != "tell":
            key = (arm, *(o.cell for o in (*tell, *group)))
            found.setdefault(key, ([], tell, group))[0].append(dict(tell[0].point))
    out, names = [], dict.fromkeys(name.removesuffix(CHANGE) for name in tabulated(study))
    for (arm, *_), (points, tell, group) in found.items():
        shared = {o.seed for o in tell} & {o.seed for o in group}
        if shared:
            differences = {name: bootstrap.difference(tell, group, name) for name in names}
            cells = {name: Cell.of(gap, metric(name).gap_unit, signed=True) for name, gap in differences.items()}
            out.append(Line(_shown(study, points), arm, cells, len(shared)))
    order = list(dict.fromkeys(tuple(gap.point.values()) for gap in out))
    arms = arm_order(gap.arm for gap in out)
    return sorted(out, key=lambda gap: (order.index(tuple(gap.point.values())), arms.index(gap.arm)))


def merged(study: Study) -> Iterator[tuple[str, list[dict], list[Outcome]]]:
    """(arm, points, outcomes), a group of cells once: first those without effective keys, then point by point."""
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

    def place(entry: tuple[str, list[dict], list[Outcome]]) -> tuple[bool, int, int]:
        arm, at, _ = entry
        return (len(at) == 1, points.index(frozen(at[0])), arms.index(arm) if arm in arms else len(arms))

    yield from sorted(found.values(), key=place)


def _shown(study: Study, points: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Values of the keys that vary; ``any`` where the points of one line differ in it."""
    shown = {}
    for key in keys_shown(study):
        values = {frozen(point.get(key)) for point in points}
        shown[key] = value_name(points[0].get(key), key) if len(values) == 1 else ANY
    return shown


def keys_shown(study: Study) -> list[str]:
    """The keys that vary, without those whose values all read the same (an ``anchor.txt`` for each data set)."""
    return [key for key in study.keys if len({value_name(row["point"].get(key), key) for row in study.rows}) > 1]


def to_csv(study: Study, table: Sequence[Line]) -> str:
    """A line for each point and arm, numbers in full: ``value``, ``low`` and ``high`` of each metric, and costs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [f"{name}{end}" for name in (table[0].cells if table else ()) for end in ("", " low", " high")]
    writer.writerow([*keys_shown(study), "arm", "seeds", "test rows", *heads, *(table[0].costs if table else ())])
    for line in table:
        cells: list[Any] = []
        for cell in line.cells.values():
            low, high = cell.ci if has_interval(cell.ci) else (None, None)
            cells += [cell.value, low, high] if cell.known else [None] * 3
        rows = max((cell.n for cell in line.cells.values() if isinstance(cell.n, int)), default=0)
        point = [text.replace(",", "") for text in line.point.values()]
        writer.writerow([*point, line.arm, line.seeds, rows, *cells, *(f"{v:.6g}" for v in line.costs.values())])
    return out.getvalue()


def table_of(study: Study, table: Sequence[Line]) -> Table:
    """The scores and costs of every point and arm."""
    keys = [key_name(key).capitalize() for key in keys_shown(study)]
    labels = [metric(name).label for name in (table[0].cells if table else ())]
    heads = [*keys, "Arm", *labels, "Seeds", "Steps", "Tokens", *FLOPS]
    rows: list[list[str | Cell]] = [
        [*line.point.values(), line.arm, *bare(line.cells), str(line.seeds), *_costs(line.costs)] for line in table
    ]
    note, own = "“any”: the key has no effect on this arm.", [line.arm == "tell" for line in table]
    return Table("", heads, rows, len(keys) + 1, note, own)


def gaps_of(study: Study, differences: Sequence[Line]) -> Table:
    """TELL minus the other arms, in the metrics that some pair has."""
    keys = [key_name(key).capitalize() for key in keys_shown(study)]
    names = [name for name in differences[0].cells if any(gap.cells[name].known for gap in differences)]
    heads = [*keys, "TELL minus", *(metric(name).label for name in names), "Seeds"]
    rows: list[list[str | Cell]] = [
        [*gap.point.values(), arm_name(gap.arm), *(gap.cells[name] for name in names), str(gap.seeds)]
        for gap in differences
    ]
    note = "Paired by seed and test row. Where an interval contains 0, the difference is not significant."
    if study.without_general_rows():
        note += (
            " Some runs did not keep per-row losses on general text: there each side's change is taken separately, "
            "which makes the interval wide rather than narrow."
        )
    return Table("TELL minus the other arms", heads, rows, len(keys) + 1, note)


def to_markdown(study: Study, table: Sequence[Line], differences: Sequence[Line]) -> str:
    """Both tables, with the interval after each value."""
    text = f"# {study.title}\n\n" + _markdown(table_of(study, table))
    if differences:
        title = "\n## TELL minus the other arms, paired by seed and test row\n\n"
        text += title + _markdown(gaps_of(study, differences))
    return text


def _markdown(table: Table) -> str:
    marks = ["---"] * table.names + ["---:"] * (len(table.heads) - table.names)
    rows: list[Sequence[str | Cell]] = [table.heads, marks, *table.rows]
    return "".join(f"| {' | '.join(map(_text, row))} |\n" for row in rows)


def _text(cell: str | Cell) -> str:
    if isinstance(cell, Cell):
        ends = show_interval(cell.ci, cell.unit, sign=cell.signed)
        cell = show(cell.value, cell.unit, sign=cell.signed) + (f" [{ends}]" if ends else "")
    return cell.replace("|", "\\|").replace("\n", " ")


def _costs(costs: Mapping[str, float]) -> list[str]:
    """Steps, tokens and FLOPs of training, counted and as 6 N D, and FLOPs of answering the test rows."""
    flops = (show_power(costs["flops"]), show_power(costs["flops_6nd"]))
    trained = (f"{costs['steps']:,.0f}", f"{costs['tokens']:,.0f}", *flops)
    return [*(trained if costs["steps"] else ("–",) * 4), show_power(costs["eval_flops"])]


def bare(cells: Mapping[str, Cell]) -> list[Cell]:
    """The cells of a line; a loss next to its change has no interval: the change has the relevant one."""
    return [
        replace(cell, ci=None) if name.endswith(LOSS) and f"{name}{CHANGE}" in cells else cell
        for name, cell in cells.items()
    ]
