"""``tell separate``: hidden states of task and general queries, without and with the anchor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tell.cli.common import Given, configured, configured_by_run, one_of, read_number
from tell.errors import TellError

if TYPE_CHECKING:
    from rich.console import RenderableType


@configured("separate")
def separate(
    given: Given,
    layer: Annotated[
        str, typer.Option("--layer", metavar="N", help="layer, 0 for the embeddings; middle; or all")
    ] = "middle",
    queries: Annotated[str, typer.Option("--queries", metavar="N", help="queries of each group")] = "50",
    state: Annotated[str, typer.Option("--state", metavar="KIND", help="last prompt token, or mean")] = "last",
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="ARM", help="with this arm's adapter of the run")
    ] = None,
    match_length: Annotated[
        bool, typer.Option("--match-length", help="Choose general queries of the task queries' lengths.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="write numbers and t-SNE picture here")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace those that lie there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> None:
    """Measure how the anchor separates DATA from general queries.

    DATA may be a run folder. Probe, silhouette and MMD of hidden states; -o adds a t-SNE picture.

    Example: tell separate tickets.jsonl --general alpaca.jsonl --anchor @anchor.txt -o separation
    """
    rows = read_number("--queries", queries)
    if rows < 1:
        raise TellError(f"{rows} queries", where="--queries", remedy="Give 5 or more.")
    kind = one_of("--state", "last", "mean")(state)
    run = _run_of(given)
    config = given.load("separate")
    import tell
    from tell.cli.display import make_console, make_display
    from tell.cli.output import only_json, say
    from tell.verbs.separate import Comparison

    with only_json(as_json) as emit:
        result = tell.separate(
            config,
            run=run,
            compare=Comparison(layer, rows, kind, match_length, adapter),
            out=out,
            overwrite=overwrite,
            display=make_display(),
        )
        if as_json:
            emit(result)
        else:
            make_console().print(_table(result))
    if out is not None:
        say(f"written to {out}: separation.json, separation.svg, separation.png", err=True)


def _run_of(given: Given) -> Path | None:
    """The run folder that stands in DATA's place; its run.yaml is the configuration then.

    Raises:
        TellError: a folder that is no run, or a run with a configuration beside it.
    """
    if given.data is None or not Path(given.data).is_dir():
        return None
    folder = Path(given.data)
    if not (folder / "run.yaml").exists():
        raise TellError("holds no run", where=given.data, remedy="Give a file, or the folder `tell tune` wrote.")
    if given.file is not None:
        raise TellError("a run and -c are both given", where=given.data, remedy="Give one of them.")
    configured_by_run(given, folder, scores=False)
    given.data = None
    return folder


def _table(result: dict) -> RenderableType:
    """A row for each layer and contrast, what the anchor adds, and what to beware of."""
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
