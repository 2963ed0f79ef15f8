"""The page of `tell look`, from its facts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from tell.metric_names import MetricSpec, metric
from tell.number_text import show_count
from tell.report.page import fill
from tell.report.score_tables import Cell, Line, Plotted
from tell.report.svg import SHARE, axis_strip, bar_strip, histogram
from tell.shown import one_line

VALUES_OPEN = 15  # values of a field that are shown; further ones unfold
LEVELS = {"refused": "What tell tune refuses", "warning": "To look at", "note": "To know"}
PARTS = ("train", "validation", "test")


def render_look(facts: Mapping[str, Any], *, name: str) -> str:
    """The facts of `tell.look` as one page, which loads nothing and runs no script.

    Args:
        name: of the data, for the title.
    """
    return fill("look.html.j2", name=name, **look_parts(facts))


def look_parts(facts: Mapping[str, Any]) -> dict[str, object]:
    """What ``_looked.html.j2`` shows, from the facts of `tell.look`."""
    return {
        "facts": facts,
        "summary": summary(facts),
        "levels": LEVELS,
        "parts": PARTS,
        "fields": [_field(entry) for entry in facts["fields"]],
        "values_open": VALUES_OPEN,
        "chart": _chart(facts["lengths"]),
        "intervals": _intervals(facts["intervals"]),
    }


def summary(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the data was read, as (label, value); the terminal shows the same."""
    data, test, split, model = facts["data"], facts["test"], facts["split"], facts["model"]
    columns = ", ".join(f"{part} from {column}" for part, column in data["columns"].items())
    encoding = data["encoding"] not in (None, "utf-8") and data["encoding"]
    read = "".join(f", {what}" for what in (data["sheet"] and f"sheet {data['sheet']}", encoding) if what)
    sizes = ", ".join(f"{split[part]:,} {part}" for part in PARTS)
    how = "test file given" if test else f"test rows split off by seed {facts['seed']}"
    found: list[tuple[str, str | None]] = [
        ("Data", f"{data['path']}, {data['rows']:,} rows{read}"),
        ("Layout", data["layout"] + (f" ({columns})" if columns else "")),
        ("Flags", data["flags"]),
        ("Test", f"{test['path']}, {test['rows']:,} rows, {test['layout']}" if test else None),
        ("Task", facts["kind"]["why"]),
        ("Split", f"{sizes} ({how})"),
        ("Model", f"{model['name']} ({model['origin']})" if model["name"] else "not on this machine"),
    ]
    return [(label, one_line(value)) for label, value in found if value]


def _field(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A field with its bars, the longest of full width."""
    top = max((sum(value[part] for part in PARTS) for value in entry["values"]), default=0) or 1
    bars = [bar_strip((part, value[part] / top) for part in PARTS) for value in entry["values"]]
    constant = entry["constant"]
    score = metric(constant["metric"]).phrase if constant and constant["right"] is None else ""
    return {**entry, "score": score, "values": list(zip(entry["values"], bars, strict=True))}


def _chart(lengths: Mapping[str, Any] | None) -> Markup | None:
    if lengths is None:
        return None
    last, limit, over = lengths["edges"][-1], lengths["limit"], lengths["over"]["total"]
    said = f"Up to {show_count(round(last))} tokens; {over:,} training rows are longer than the limit of {limit:,}."
    return histogram(lengths["counts"], last, limit, title="Rows by their length in tokens", said=said)


def _intervals(entries: list[Mapping[str, Any]]) -> Plotted:
    lines = []
    for entry, name in zip(entries, ("A score of 90 %", "The constant baseline"), strict=False):
        cell = Cell(entry["score"], entry["ci"], entry["n"], "share")
        lines.append(Line(name, "", cell, cell.strip(SHARE)))
    return Plotted(MetricSpec("score", "Score", "share"), lines, axis_strip(SHARE, lambda tick: f"{100 * tick:g} %"))
