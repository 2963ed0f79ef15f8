"""``tell general``: the general data sets that have a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tell.cli.common import json_switch, show, takes_options

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class GeneralOptions:
    as_json: bool = json_switch()


@takes_options
def general(options: GeneralOptions) -> None:
    """List the general data sets that --general knows by name.

    Other sources: a file, any hub name, builtin, self, none.
    """
    from tell.data.named_general import general_sets

    sets = [known.model_dump() for known in general_sets().values()]
    show(options.as_json, lambda display: {"sets": sets}, show_sets)


def show_sets(console: Console, found: dict) -> None:
    """A row for each set."""
    from rich.table import Table

    table = Table(header_style="bold")
    for title in ("name", "rows", "languages", "licence", "what it is"):
        table.add_column(title, justify="right" if title == "rows" else "left", overflow="fold")
    for known in found["sets"]:
        about = f"{known['about']} ({known['hub']}, {known['revision'][:8]})"
        table.add_row(known["name"], f"{known['rows']:,}", known["languages"], known["licence"], about)
    console.print(table)
