"""docs/reference/cli.md has every verb and flag, and is current."""

from __future__ import annotations

from pathlib import Path

import typer

from tell.cli.cli_docs import cli_docs
from tell.cli.main import app

PAGE = Path(__file__).parents[2] / "docs/reference/cli.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == cli_docs(), f"run python -m tell.cli.cli_docs > {PAGE}"


def test_every_verb_and_flag_is_on_the_page() -> None:
    text = cli_docs()
    for name, command in typer.main.get_command(app).commands.items():
        part = text.partition(f"## tell {name}\n")[2].partition(f"\n## tell {'zz' if name == 'build' else ''}")[0]
        assert part, name
        for param in command.params:
            for flag in param.opts if param.param_type_name == "option" else ():
                assert f"`{flag}`" in part, f"{name} {flag}"
