"""``tell anchor``: let the model write the task's instruction, and choose the best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tell.cli.common import Given, configured
from tell.errors import TellError

if TYPE_CHECKING:
    from rich.console import Console


@configured("anchor")
def anchor(
    given: Given,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="write the best one's text here, for --anchor @FILE"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> None:
    """Let the model write the instruction that marks DATA's rows.

    Several candidates are written and scored; the best is printed.
    """
    config = given.load("anchor")
    if out is not None and out.exists() and not overwrite:
        raise TellError("exists already", where=str(out), remedy="Give another file with -o, or --overwrite.")
    import tell
    from tell.cli.display import make_display
    from tell.cli.output import only_json
    from tell.cli.tables import make_console
    from tell.run import write_text

    with only_json(as_json) as emit:
        result = tell.write_anchor(config, display=make_display())
        if out is not None:
            write_text(out, result["text"].rstrip("\n") + "\n")
        if as_json:
            emit(result)
        else:
            _show(make_console(), result)
    if out is not None:
        typer.echo(f"written to {out}; use it with --anchor @{out}", err=True)


def _show(console: Console, result: dict) -> None:
    from rich.table import Table
    from rich.text import Text

    from tell.cli.tables import clean

    table = Table(header_style="bold", show_lines=True)
    table.add_column("score", justify="right")
    table.add_column("from")
    table.add_column("candidate", ratio=1)
    for candidate in result.get("candidates", ()):
        score = candidate.get("score")
        shown = "-" if score is None else f"{score:.4g}"
        best = candidate["text"] == result["text"]
        table.add_row(
            shown, candidate.get("origin", ""), Text(clean(candidate["text"])), style="bold" if best else "dim"
        )
    if table.row_count:
        console.print(table)
    console.print(Text(clean(result["text"])))
