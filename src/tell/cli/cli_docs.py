"""``python -m tell.cli.cli_docs > docs/reference/cli.md``: every verb and flag, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast

import typer

from tell.cli.main import app

_HEAD = """\
# Commands

Every verb and flag of `tell`. Written by `python -m tell.cli.cli_docs`; `tell VERB --help` prints the same. A name in
parentheses is the [configuration key](config.md) that a flag sets.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a fault in tell; some cells of a study failed |
| 2 | bad input; one line says what, where and how to fix it |
| 130 | interrupted; `--resume` continues |
"""


class Flag(Protocol):
    """A flag or argument of click."""

    name: str
    opts: list[str]
    secondary_opts: list[str]
    param_type_name: str
    metavar: str | None
    help: str | None
    default: object
    required: bool
    is_flag: bool
    show_default: bool


class Verb(Protocol):
    """A command of click."""

    help: str | None
    params: list[Flag]


class Verbs(Verb, Protocol):
    """A group of click."""

    commands: dict[str, Verb]


def cli_docs() -> str:
    """All verbs as Markdown: usage, purpose and a table of flags for each."""
    group = cast(Verbs, typer.main.get_command(app))
    parts = [_HEAD, *_verb(group, "tell", top=True)]
    for name, command in group.commands.items():
        parts += _verb(command, f"tell {name}")
        for inner, below in getattr(command, "commands", {}).items():
            parts += _verb(below, f"tell {name} {inner}")
    return "\n".join(parts)


def _verb(command: Verb, path: str, *, top: bool = False) -> Iterator[str]:
    """One verb: heading, what it does, usage, flags by panel."""
    about = [part.replace("\n", " ").strip() for part in (command.help or "").split("\n\n")]
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    below = hasattr(command, "commands")
    names = [f"[{_metavar(a)}]" if not a.required else _metavar(a) for a in arguments] + ["VERB"] * below
    if not top:
        yield f"## {path}\n"
    usage = " ".join([path, "[FLAGS]", *names])
    example = next((part.removeprefix("Example: ") for part in about if part.startswith("Example: ")), "")
    yield from (f"{part}\n" for part in about if not part.startswith("Example: "))
    yield f"```text\n{usage}\n```\n"
    if example:
        yield f"For example:\n\n```bash\n{example}\n```\n"
    if arguments and any(getattr(a, "help", None) for a in arguments):
        yield "| argument | meaning |\n|---|---|"
        yield from (f"| `{_metavar(a)}` | {_cell(a.help or '')} |" for a in arguments)
        yield ""
    yield from _flags(command)


def _flags(command: Verb) -> Iterator[str]:
    """A table of flags for each panel, in the order of ``--help``."""
    panels: dict[str, list[str]] = {}
    for param in command.params:
        if param.param_type_name == "option" and not getattr(param, "hidden", False):
            panels.setdefault(getattr(param, "rich_help_panel", None) or "", []).append(_row(param))
    for panel, rows in panels.items():
        yield f"| {panel or 'flag'} | value | meaning |\n|---|---|---|"
        yield from rows
        yield ""


def _row(param: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    value = "" if param.is_flag else f"`{_metavar(param)}`"
    shown = param.default not in (None, False, (), []) and param.show_default and not callable(param.default)
    default = f" (default: `{param.default}`)" if shown else ""
    return f"| {names} | {value} | {_cell(param.help or '')}{default} |"


def _metavar(param: Flag) -> str:
    name = param.metavar or param.name.upper()
    return str(name).strip("{}[]").removesuffix("...") if param.param_type_name == "argument" else str(name)


def _cell(text: str) -> str:
    text = text.replace("\n", " ").replace("|", "\\|").replace("<", "\\<")
    text = text.removesuffix(".") if text.count(". ") == 0 else text
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


if __name__ == "__main__":
    print(cli_docs(), end="")
