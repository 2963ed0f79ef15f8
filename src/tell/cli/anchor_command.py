"""``tell anchor``: let the model write the task's instruction, and compare it with those written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tell.cli.common import Given, configured, read_number
from tell.errors import TellError

if TYPE_CHECKING:
    from rich.console import Console


@configured("anchor")
def anchor(
    given: Given,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", metavar="TEXT", help="an anchor written by hand, or @FILE; repeatable"),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option("--score", metavar="A,B,...", help="loss, separation, short-run; default: the cheap ones"),
    ] = None,
    short_steps: Annotated[
        str | None,
        typer.Option(
            "--short-steps", metavar="N", help="steps of a short run for each candidate; 8 where --score asks for it"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="write the best one's text here, for --anchor @FILE"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> None:
    """Let the model write the instruction that marks DATA's rows.

    Several candidates are written and scored beside those given by hand; the best is printed.
    """
    scores = None if score is None else tuple(name.strip() for name in score.split(","))
    steps = read_number("--short-steps", short_steps)
    config = given.load("anchor")
    if out is not None and out.exists() and not overwrite:
        raise TellError("exists already", where=str(out), remedy="Give another file with -o, or --overwrite.")
    import tell
    from tell.cli.display import make_console, make_display
    from tell.cli.output import only_json, say
    from tell.files import write_text

    with only_json(as_json) as emit:
        result = tell.write_anchor(
            config, compare=tuple(compare or ()), scores=scores, short_steps=steps, display=make_display()
        )
        if out is not None:
            write_text(out, result["text"].rstrip("\n") + "\n")
        if as_json:
            emit(result)
        else:
            _show(make_console(), result)
    if out is not None:
        say(f"written to {out}; use it with --anchor @{out}", err=True)


def _show(console: Console, result: dict) -> None:
    from rich.table import Table
    from rich.text import Text

    from tell.cli.tables import clean

    candidates = result["candidates"]
    columns = {name: title for name, title in _COLUMNS.items() if any(name in c for c in candidates)}
    table = Table(header_style="bold", show_lines=True)
    for title in columns.values():
        table.add_column(title, justify="right")
    table.add_column("from")
    table.add_column("candidate", ratio=1)
    for candidate in candidates:
        best = candidate["text"] == result["text"]
        cells = [_cell(candidate.get(name)) for name in columns]
        origin = candidate["origin"] + (f": {candidate['reason']}" if "reason" in candidate else "")
        table.add_row(*cells, origin, Text(clean(candidate["text"])), style="bold" if best else "dim")
    console.print(table)
    runs = result["decided_by"] == "short_run"
    why = "validation loss after a short run" if runs else "loss of the right answers under the untuned model"
    console.print(Text(f"chosen by the lowest {why}", style="italic"))
    console.print(Text(clean(result["text"])))


_COLUMNS = {
    "loss": "loss",
    "loss_difference": "from the first by hand",
    "short_run": "after a short run",
    "short_run_difference": "from the first by hand",
    "separation": "separation",
}


def _cell(entry: dict | None) -> str:
    if entry is None:
        return "-"
    if "probe" in entry:
        mmd = entry["mmd2"]
        return f"probe {entry['probe']['value']:.0%}, MMD² {mmd['value']:.3f}\np = {mmd['p']:.2g}"
    if entry["value"] is None:
        return "diverged"
    low, high = entry["ci"]
    return f"{entry['value']:.3f}\n[{low:.3f}, {high:.3f}]"
