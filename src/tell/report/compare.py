"""Several runs side by side: arms with intervals for each run, and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tell.errors import TellError
from tell.files import stamp
from tell.folder import RunFolder
from tell.metric_names import metric
from tell.names import arm_order
from tell.report.page import fill, verdict_of
from tell.report.paired import Pairing, pairings
from tell.report.read_run import Run, flatten, get, mapping, read_run
from tell.report.score_tables import Cell, Line, Plotted, axis, metric_names, primary_metric, scale_of
from tell.report.sections import TRAIN, model_name

ABSENT = "–"
IGNORED = {"out"}
"""Settings that are locations, which do not affect numbers."""


def compare(folders: Sequence[RunFolder]) -> str:
    """One self-contained HTML page that shows runs side by side.

    Args:
        folders: at least two run folders, in the order of the page.

    Raises:
        TellError: fewer than two folders, or one that does not exist.
    """
    if len(folders) < 2:
        raise TellError(f"{len(folders)} run given", where="tell report", remedy="Pass two run folders or more.")
    runs = [read_run(folder) for folder in folders]
    names = run_names(runs)
    return fill(
        "compare.html.j2",
        names=names,
        runs=[
            {"name": n, "model": model_name(r), "date": r.date, "verdict": verdict_of(r), "problems": r.problems}
            for n, r in zip(names, runs, strict=True)
        ],
        same=same_rows(runs),
        pairs=pairings(runs, names),
        tables=tables(runs, names),
        settings=settings(runs),
        train=costs(runs, names),
        train_columns=[label for _, label, _ in TRAIN],
    )


def compare_kept(folders: Sequence[RunFolder]) -> str:
    """`compare`, made again only where a file of the runs has changed."""
    parts = ("*.*", "predictions/*", "logs/*")  # all that is read of a run, its schema included
    files = [path for folder in folders for part in parts for path in sorted(folder.root.glob(part))]
    return _compared(tuple(folder.root for folder in folders), tuple((path, stamp(path)) for path in files))


@lru_cache(maxsize=4)
def _compared(roots: Sequence[Path], _stamps: object) -> str:
    return compare([RunFolder(root) for root in roots])


def paired(folders: Sequence[RunFolder]) -> list[Pairing]:
    """Every run against the first, on the test rows that both answered."""
    runs = [read_run(folder) for folder in folders]
    return pairings(runs, run_names(runs))


def run_names(runs: Sequence[Run]) -> list[str]:
    """Folder names; with their parents where two are equal, numbered where even those are."""
    names = [r.name for r in runs]
    if len(set(names)) < len(names):
        names = ["/".join(r.folder.root.resolve().parts[-2:]) for r in runs]
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


def same_rows(runs: Sequence[Run]) -> bool | None:
    """Whether all runs were scored on the same test rows; None if a run does not say."""
    sets = []
    for run in runs:
        rows = next(iter(run.predictions.values()), None)
        if not rows or any("hash" not in row for row in rows):
            return None
        sets.append(sorted(str(row["hash"]) for row in rows))
    return all(s == sets[0] for s in sets)


def tables(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, Plotted]]:
    """For each metric, its arms with a line per run; the first run's primary metric first."""
    primaries = [p for p in (primary_metric(r.metrics) for r in runs) if p]
    every = [entries for run in runs for entries in mapping(run.metrics, "arms").values()]
    arms = arm_order(name for run in runs for name in mapping(run.metrics, "arms"))
    out = []
    for name in metric_names(every, primaries[0] if primaries else None):
        what = metric(name)
        cells = [
            (arm, label, Cell.of(entry, what.unit))
            for arm in arms
            for label, run in zip(names, runs, strict=True)
            if (entry := get(run.metrics, "arms", arm, name)) is not None
        ]
        scale = scale_of([cell for _, _, cell in cells], what)
        lines = [Line(arm, label, cell, cell.strip(scale)) for arm, label, cell in cells]
        out.append((name, Plotted(what, lines, axis(scale, what.unit), note="primary" if name in primaries else "")))
    return out


def settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys of ``run.yaml`` whose values are not the same in all runs, with each run's value; the anchor's text
    is among them."""
    flat = [flatten(r.config) | ({"anchor (as used)": r.anchor["text"]} if r.anchor.get("text") else {}) for r in runs]
    keys = [k for k in dict.fromkeys(k for f in flat for k in f) if k not in IGNORED]
    return [
        (k, [_shown(f.get(k, ABSENT)) for f in flat])
        for k in keys
        if any(f.get(k, ABSENT) != flat[0].get(k, ABSENT) for f in flat)
    ]


def costs(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """(arm, run, cost of its training)."""
    arms = arm_order(a for r in runs for a in mapping(r.metrics, "train", "arms"))
    return [
        (arm, name, [show(get(run.metrics, "train", "arms", arm, key)) for key, _, show in TRAIN])
        for arm in arms
        for name, run in zip(names, runs, strict=True)
        if mapping(run.metrics, "train", "arms", arm)
    ]


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
