"""``tell gate``: an exit code that says whether a run is good enough."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tell.cli.common import argument, check_arm, json_switch, number, option, show, takes_options
from tell.errors import TellError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class GateOptions:
    run: Path = argument("RUN", "run folder")
    least: tuple[str, ...] = option(
        "--min", "the metric must reach VALUE (a loss: stay below it); repeatable", "METRIC=VALUE", default=()
    )
    not_worse_than: tuple[str, ...] = option(
        "--not-worse-than", "an older run, and how much worse is allowed (0); repeatable", "RUN[:MARGIN]", default=()
    )
    arm: str = option("--arm", "the arm that is judged", "ARM", check_arm, default="tell")
    junit: Path | None = option("--junit", "write the outcomes as JUnit XML", "FILE")
    as_json: bool = json_switch()


@takes_options
def gate(options: GateOptions) -> None:
    """Judge a run by the ends of its intervals.

    Exit code 0: passed; 1: failed; 3: too few test rows to tell, and how many would do.

    Example: tell gate runs/tickets-2 --min accuracy=0.9 --not-worse-than runs/tickets-1:0.02
    """
    from tell.verbs.gate import Limit, NotWorse
    from tell.verbs.gate import gate as judge

    conditions: list[Limit | NotWorse] = []
    for text in options.least:
        name, equals, value = text.rpartition("=")
        conditions.append(Limit(name.strip(), _number(value if equals else "", f"--min {text}", "METRIC=VALUE")))
    for text in options.not_worse_than:
        run, colon, margin = text.rpartition(":")
        if not colon or Path(text).is_dir():
            conditions.append(NotWorse(text))
            continue
        conditions.append(NotWorse(run, _margin(margin, f"--not-worse-than {text}")))
    found = show(
        options.as_json,
        lambda display: judge(options.run, conditions, arm=options.arm, junit=options.junit),
        show_gate,
    )
    raise typer.Exit(found["exit_code"])


def _number(text: str, where: str, form: str) -> float:
    try:
        return number(text)
    except ValueError:
        raise TellError(f"{text!r} is not a number", where=where, remedy=f"Write {form}, e.g. accuracy=0.9.") from None


def _margin(text: str, where: str) -> float:
    margin = _number(text, where, "RUN:MARGIN")
    if margin < 0:
        raise TellError("the margin is negative", where=where, remedy="Write how much worse is allowed, e.g. RUN:0.02.")
    return margin


def show_gate(console: Console, found: dict) -> None:
    """A line for each condition, then the outcome."""
    from rich.text import Text

    from tell.verbs.gate import WORDS

    colours = {True: "green", False: "red", None: "yellow"}
    for outcome in found["conditions"]:
        word = WORDS[outcome["passed"]]
        line = Text.assemble((f"{word:<12}", colours[outcome["passed"]]), f"{outcome['condition']}: {outcome['text']}")
        console.print(line, soft_wrap=True)
    if len(found["conditions"]) > 1:
        console.print(Text(WORDS[found["passed"]], style="bold"))
