"""``tell look``: what the model will see of the data, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tell.cli.common import Given, count, json_switch, option, show, takes_options
from tell.errors import TellError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from tell.config import Config
    from tell.progress import Display

BAR, VALUES, PIECE = 24, 12, 1200  # cells of a bar, values of a field, characters of a piece
MARKS = {"trained": ("⟦", "⟧", "bold underline green"), "anchor": ("⟪", "⟫", "italic reverse cyan")}
"""How pieces of a row are marked: by brackets where the output is no terminal, else by a style that shows without
colour too."""
LEVELS = {"refused": ("✗ `tell tune` refuses this:", "bold red"), "warning": ("!", "bold yellow"), "note": ("·", "")}


@dataclass(frozen=True)
class LookOptions:
    html: Path | None = option("--html", "where to write the page; default: DATA.look.html, here", "FILE")
    rows: int = option("--rows", "training rows to show", "N", count, 5)
    as_json: bool = json_switch()


@takes_options
def look(given: Given, options: LookOptions) -> None:
    """Show what the model will see of DATA before training.

    In the terminal and as one offline page: rendered rows, balance, lengths, rows to look at. Takes the data and model
    flags of `tell plan`. With --json, the page is written only where --html says so, and data that can be read in
    several ways is looked at in the likeliest one.
    """
    config = given.load("look")
    import tell
    from tell.verbs.look import look_page

    page = options.html or (None if options.as_json else look_page(config))

    def work(_display: Display) -> dict:  # all that would be noted is printed or in the JSON
        return tell.look(config, rows=options.rows, page=page)

    def failed(error: TellError) -> dict:
        return _failed(config, error, rows=options.rows)

    show(options.as_json, work, lambda console, found: _print(console, found), failed)


def _failed(config: Config, error: TellError, *, rows: int) -> dict:
    """Beside the error: the sheets and columns to choose from, the given form, the plausible ones, a look.

    A terminal shows these as commands; a program needs them as values.
    """
    import tell
    from tell.data.file_read import FileRead
    from tell.data.formats import column_names
    from tell.data.shape import SeveralForms
    from tell.files import expanded

    names, file = list[str](), FileRead()
    with suppress(TellError, OSError, ValueError):
        names = column_names(expanded(config.task.data or ""), found=file)
    forms = [form.to_dict() for form in error.forms] if isinstance(error, SeveralForms) else []
    form = {"prompt": config.task.prompt, "answer": list(config.task.answer)}
    found = {
        "error": str(error),
        "names": names,
        "sheet": file.sheet,
        "sheets": list(file.sheets),
        "form": form,
        "forms": forms,
        "look": None,
    }
    with suppress(TellError):
        if forms:
            first = {"prompt": forms[0]["prompt"], "answer": tuple(forms[0]["answer"])}
            task = config.task.model_copy(update=first)
            found["look"] = tell.look(config.model_copy(update={"task": task}), rows=rows)
    return found


def _print(console: Console, found: Mapping[str, Any]) -> None:
    from rich.text import Text

    from tell.report.look_page import summary

    for label, value in summary(found):
        console.print(Text.assemble((f"{label:8}", "bold"), value), soft_wrap=True)
    for notice in found["notices"]:
        console.print(Text(f"note: {notice}", style="yellow"), soft_wrap=True)
    for part in (*_rows(console, found), *_balance(found["fields"]), *_lengths(found["lengths"]), Text()):
        console.print(part)
    console.print(Text("What to look at", style="bold"))
    for check in found["checks"]:
        sign, style = LEVELS[check["level"]]
        console.print(Text(f"{sign} {check['text']}", style=style))
    if found["page"]:
        console.print(Text(f"page     {found['page']}"), soft_wrap=True)


def _rows(console: Console, found: Mapping[str, Any]) -> Iterator[RenderableType]:
    from rich.text import Text

    styled = console.is_terminal and not console.is_dumb_terminal
    rendered = [name for name in MARKS if any(p[name] for row in found["rows"] for p in row["pieces"] or ())]
    yield Text()
    legend = Text("What the model sees" if rendered else "Rows as read", style="bold")
    for name in rendered:
        legend.append("  ", "not bold").append_text(_marked(name, [name], styled))
    yield legend
    for row in found["rows"]:
        counts = f", {row['tokens']:,} tokens, {row['trained_tokens']:,} trained" if row["pieces"] else ""
        yield Text(f"\n{row['origin']} ({row['why']}{counts})", style="bold")
        if row["pieces"] is None:
            yield from (Text(f"{turn['role']}: {_cut(turn['text'])}") for turn in row["turns"])
            continue
        text = Text()
        for piece in row["pieces"]:
            text.append_text(_marked(_cut(piece["text"]), [name for name in MARKS if piece[name]], styled))
        text.rstrip()
        yield text


def _marked(text: str, names: Sequence[str], styled: bool) -> Text:
    from rich.text import Text

    if styled:
        return Text(text, style=" ".join(MARKS[name][2] for name in names))
    for name in names:
        text = f"{MARKS[name][0]}{text}{MARKS[name][1]}"
    return Text(text)


def _cut(text: str) -> str:
    from tell.shown import shorten

    return shorten(text, PIECE)


def _balance(fields: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    from tell.shown import brief

    for one in fields:
        totals = [value["train"] + value["validation"] + value["test"] for value in one["values"]]
        top = max([*totals, 1])
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(Text(brief(one["field"])), max_width=40)
        table.add_column("")
        for title in ("train", "validation", "test"):
            table.add_column(title, justify="right")
        for value, total in list(zip(one["values"], totals, strict=True))[:VALUES]:
            bar = "█" * round(BAR * total / top) or "▏"
            counts = (f"{value[part]:,}" for part in ("train", "validation", "test"))
            table.add_row(Text(brief(value["value"])), bar, *counts)
        yield Text()
        yield table
        if (hidden := len(totals) + one["more_values"] - VALUES) > 0:
            yield Text(f"and {hidden:,} further values", style="dim")


def _lengths(lengths: Mapping[str, Any] | None) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    if lengths is None:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"tokens (limit {lengths['limit']:,})")
    for title in next(iter(lengths["parts"].values())):
        table.add_column(title, justify="right")
    for part, found in lengths["parts"].items():
        table.add_row(part, *(f"{value:,.0f}" for value in found.values()))
    yield Text()
    yield table
