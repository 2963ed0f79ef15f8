"""``tell separate``: hidden states of task and general queries, without and with the anchor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tell.cli.common import Given, configured_by_run, count, json_switch, option, show, switch, takes_options
from tell.errors import TellError

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class SeparateOptions:
    layer: str = option("--layer", "layer, 0 for the embeddings; middle; or all", "N", default="middle")
    queries: int = option("--queries", "queries of each group", "N", count, default=50)
    state: Literal["last", "mean"] = option(
        "--state", "last prompt token, or mean", "KIND", ("last", "mean"), default="last"
    )
    adapter: str | None = option("--adapter", "use this arm's adapter", "ARM")
    match_length: bool = switch("--match-length", "Choose general queries as long as the task queries.")
    out: Path | None = option("-o --out", "write numbers and t-SNE figure here", "DIR")
    overwrite: bool = switch("--overwrite", "Replace existing results.")
    as_json: bool = json_switch()


@takes_options
def separate(given: Given, options: SeparateOptions) -> None:
    """Measure how the anchor separates DATA from general queries.

    DATA may be a run folder. Probe, silhouette and MMD of hidden states; -o adds a t-SNE figure.

    Example: tell separate tickets.jsonl --general alpaca.jsonl --anchor @anchor.txt -o separation
    """
    if options.queries < 1:
        raise TellError(f"{options.queries} queries", where="--queries", remedy="Use 5 or more.")
    run = _run_of(given)
    config = (configured_by_run(given, run, scores=False) if run else given).load("separate")
    import tell
    from tell.cli.output import say
    from tell.verbs.separate import Comparison

    compare = Comparison(options.layer, options.queries, options.state, options.match_length, options.adapter)
    show(
        options.as_json,
        lambda display: tell.separate(
            config, run=run, compare=compare, out=options.out, overwrite=options.overwrite, display=display
        ),
        lambda console, found: console.print(_table(found)),
    )
    if options.out is not None:
        say(f"written to {options.out}: separation.json, separation.svg, separation.png", err=True)


def _run_of(given: Given) -> Path | None:
    """The run folder given as DATA; its run.yaml is the configuration then."""
    if given.data is None or not Path(given.data).is_dir():
        return None
    folder = Path(given.data)
    from tell.folder import RunFolder

    if not RunFolder(folder).config.exists():
        raise TellError("is not a run folder", where=given.data, remedy="Pass a file, or the folder `tell tune` wrote.")
    if given.file is not None:
        raise TellError("a run and -c are both given", where=given.data, remedy="Give one of them.")
    return folder


def _table(result: dict) -> RenderableType:
    """Print a row for each layer and contrast, and the notices."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = (
        f"{result['queries']} queries of each group, state: {result['state']}, 95 % intervals; chance of a probe 50 %"
    )
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("layer", "queries", "probe", "length alone", "silhouette", "MMD²", "p"):
        table.add_column(name, justify="left" if name == "queries" else "right")
    for layer, contrasts in result["layers"].items():
        for name, numbers in contrasts.items():
            probe, silhouette = _percent(numbers["probe"]), _plain(numbers["silhouette"])
            if "mmd2" not in numbers:
                table.add_row(layer, name, probe, "", silhouette, "", "", style="dim")
                continue
            length, p = _percent(result["length"][name]), f"{numbers['mmd2']['p']:.2g}"
            table.add_row(layer, name, probe, length, silhouette, _plain(numbers["mmd2"]), p)
    return Group(table, *(Text(f"note: {text}", style="yellow") for text in result["notices"]))


def _percent(entry: dict) -> str:
    low, high = entry["ci"]
    return f"{entry['value']:.0%} [{low:.0%}, {high:.0%}]"


def _plain(entry: dict) -> str:
    low, high = entry["ci"]
    return f"{entry['value']:.3f} [{low:.3f}, {high:.3f}]"
