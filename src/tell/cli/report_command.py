"""``tell report``: write the page of one or several runs again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tell.cli.output import say


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders", show_default=False)],
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="where to write the page")] = None,
) -> None:
    """Write the report of a run, or one page for several."""
    import tell

    say(tell.write_report(runs, out=out))
