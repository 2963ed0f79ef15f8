"""``tell report``: write the page of one or several runs again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tell.cli.output import say

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tell.report.paired import Pairing

FLIPS_SHOWN = 10


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders", show_default=False)],
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="where to write the page")] = None,
) -> None:
    """Write the report of a run, or one page for several.

    Several runs are paired with the first on the test rows they share.
    """
    import tell

    path = tell.write_report(runs, out=out)
    if len(runs) > 1:
        from tell.cli.display import make_console
        from tell.folder import RunFolder
        from tell.report.compare import paired

        for pairing in paired([RunFolder(run) for run in runs]):
            make_console(stderr=True).print(pairing_table(pairing))
    say(path)


def pairing_table(pairing: Pairing) -> RenderableType:
    """The paired differences of two runs by arm and metric, then rows that flipped."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from tell.cli.tables import METRICS_SHOWN
    from tell.number_text import as_typed, show, show_interval

    new, old = pairing.names
    if not pairing.rows:
        return Text(f"{new} and {old} have no test row in common, so they cannot be paired", style="yellow")
    of = "" if pairing.of == (pairing.rows, pairing.rows) else f" of {pairing.of[0]:,} and {pairing.of[1]:,}"
    title = f"{new} minus {old}, {pairing.rows:,} shared test rows{of}, paired 95 % intervals"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("arm", no_wrap=True)
    columns = [i for i, spec in enumerate(pairing.grid.terms) if ":" not in spec.name][:METRICS_SHOWN]
    for i in columns:
        table.add_column(pairing.grid.terms[i].phrase, justify="right")
    for arm, cells in pairing.grid.rows:
        shown = (
            f"{show(c.value, c.unit, sign=True)} [{show_interval(c.ci, c.unit)}]" if c.known else "-"
            for c in (cells[i] for i in columns)
        )
        table.add_row(arm, *map(as_typed, shown))
    parts: list[RenderableType] = [table]
    if pairing.spec is not None:
        counts = f"{new} is {pairing.right} on {pairing.gained:,} rows where {old} is not, {old} on {pairing.lost:,}"
        parts.append(Text(f"{pairing.spec.phrase} of {pairing.arm}: {counts}", style="bold"))
    if pairing.flips:
        flips = Table(header_style="bold", expand=True)
        for column in ("question", pairing.right, new, old):
            flips.add_column(column, ratio=2 if column == "question" else 1, overflow="fold")
        for flip in pairing.flips[:FLIPS_SHOWN]:
            texts = (flip.question, flip.better, *(answer for _, answer, _ in flip.answers))
            flips.add_row(*(Text(_cut(text)) for text in texts))
        parts.append(flips)
        if (more := pairing.gained + pairing.lost - FLIPS_SHOWN) > 0:
            parts.append(Text(f"and {more:,} more; the page shows them with their references"))
    return Group(*parts)


def _cut(text: str, length: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length].rstrip()} ..."
