"""Cells that train nothing: hidden states of task and general queries compared at a point (figures 3 and 4)."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tell.anchor.separation import CONTRASTS
from tell.config import Config
from tell.files import write_json, write_text
from tell.folder import RunFolder
from tell.progress import Display
from tell.run.session import ModelCache

if TYPE_CHECKING:
    from tell.studies.results import Study

SEPARATION_FORMAT = 2  # increment when a change to the code changes numbers
SEPARATE = "separate"  # used as the arm of a cell
ADDED = "added by the anchor"
WORDS = {
    "without anchor": "Task queries against general queries, none with the anchor.",
    "with anchor": "Task queries with the anchor against general queries without.",
    "control": "General queries with the task's anchor against others without: the effect of the anchor alone.",
    ADDED: "With anchor minus without, over the same queries.",
}
METRICS = ("linear_probe", "silhouette", "mmd2", "length_probe")
TOKENS = 300  # of a query with its anchor; an estimate


def contrasts(config: Config) -> tuple[str, ...]:
    """The comparisons of a cell, used as its arms; without an anchor there is only the first."""
    names = tuple(CONTRASTS)
    return (*names, ADDED) if config.anchor.text != "none" else names[:1]


def run_separation(
    folder: RunFolder, config: Config, options: Mapping[str, Any], display: Display, models: ModelCache | None = None
) -> None:
    """Compare the states and write the numbers as a run does; a killed comparison starts again.

    Args:
        options: of `tell.verbs.separate.separate`.

    Raises:
        TellError: what `separate` refuses.
    """
    from tell.verbs.separate import Comparison, separate

    begin = time.monotonic()
    shutil.rmtree(folder.root, ignore_errors=True)
    write_text(folder.config, config.model_copy(update={"out": str(folder.root)}).to_yaml())
    result = separate(config, compare=Comparison(**options), out=folder.root, display=display, models=models)
    write_json(folder.metrics, _metrics(result))
    folder.set_status("done", seconds=round(time.monotonic() - begin, 3), host=platform.node())


def _metrics(result: Mapping[str, Any]) -> dict[str, Any]:
    """``metrics.json`` as a run has it, with contrasts for arms; of the layer that the picture shows."""
    layer = result["layers"][str(result["picture"]["layer"])]
    arms: dict[str, Any] = {}
    for name in CONTRASTS:
        if found := layer.get(name):
            own = (found["probe"], found["silhouette"], found["mmd2"], result["length"][name])
            arms[name] = dict(zip(METRICS, own, strict=True))
    if "with - without" in layer:
        arms[ADDED] = {"silhouette": layer["with - without"]["silhouette"]}
    lead = "with anchor" if "with anchor" in arms else "without anchor"  # the score that the queue shows
    return {
        "task": {"kind": "separation", "primary": "silhouette", "lead": lead, "queries": result["queries"]},
        "layer": result["picture"]["layer"],
        "arms": arms,
        "train": {"arms": {}},
    }


def pictures(study: Study) -> Iterator[tuple[dict[str, Any], Path | None]]:
    """Point and ``separation.svg`` of each comparison, of the first seed that has one; None where no seed has."""
    found: dict[str, tuple[dict[str, Any], Path | None]] = {}
    for outcome in sorted(study.outcomes, key=lambda o: o.seed):
        if outcome.cell.startswith(f"{SEPARATE}-"):
            path = RunFolder(study.cells / outcome.cell).separation("svg")
            point = {key: value for key, value in outcome.point.items() if key in study.keys}
            if found.setdefault(str(point), (point, None))[1] is None and path.is_file():
                found[str(point)] = (point, path)
    yield from found.values()
