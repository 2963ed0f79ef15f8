"""``tell anchor``: let the model write the task's instruction, and compare it with hand-written ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tell.cli.common import Given, count, json_switch, option, show, switch, takes_options, words
from tell.errors import TellError

if TYPE_CHECKING:
    from rich.console import Console

    from tell.progress import Display


@dataclass(frozen=True)
class AnchorOptions:
    compare: tuple[str, ...] = option("--compare", "a hand-written anchor, or @FILE; repeatable", "TEXT", default=())
    score: tuple[str, ...] | None = option(
        "--score", "loss, separation, short-run; default: all but short-run", "A,B,...", words
    )
    short_steps: int | None = option(
        "--short-steps", "optimiser steps of each short run; 8 if --score has short-run", "N", count
    )
    out: Path | None = option("-o --out", "write the best anchor here, for --anchor @FILE", "FILE")
    overwrite: bool = switch("--overwrite", "Replace that file.")
    as_json: bool = json_switch()


@takes_options
def anchor(given: Given, options: AnchorOptions) -> None:
    """Let the model write the instruction that marks DATA's rows.

    Writes several candidates, scores them with any hand-written ones, and prints the best.
    """
    config, out = given.load("anchor"), options.out
    if out is not None and out.exists() and not options.overwrite:
        raise TellError("already exists", where=str(out), remedy="Name another file with -o, or add --overwrite.")
    import tell
    from tell.cli.output import say
    from tell.files import write_text

    def work(display: Display) -> dict:
        found = tell.write_anchor(
            config, compare=options.compare, scores=options.score, short_steps=options.short_steps, display=display
        )
        if out is not None:
            write_text(out, found["text"].rstrip("\n") + "\n")
        return found

    show(options.as_json, work, _show)
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
    why = "validation loss after a short run" if runs else "loss of the reference answers under the untuned model"
    console.print(Text(f"chosen by the lowest {why}", style="italic"))
    console.print(Text(clean(result["text"])))


_COLUMNS = {
    "loss": "loss",
    "loss_difference": "from the first hand-written",
    "short_run": "after a short run",
    "short_run_difference": "from the first hand-written",
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
