"""``tell study``: a grid of runs from a recipe, to tables, figures and a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tell.cli.common import argument, count, json_switch, number, option, show, switch, takes_options
from tell.errors import TellError, did_you_mean
from tell.shown import one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN_ERRORS = 20
MARKS = {"waiting": "", "done": "✓", "failed": "✗"}


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(count(part) for part in text.split(",") if part.strip())
    except ValueError:
        seeds = ()
    if not seeds:
        raise TellError(f"{text!r} is not a list of seeds", where="--seeds", remedy="Write e.g. 42,43,44.")
    return seeds


@dataclass(frozen=True)
class StudyOptions:
    recipe: Path = argument("RECIPE", "YAML file of the study")
    data: Path | None = option("--data", "folder of ${data}", "DIR")
    variables: tuple[str, ...] = option("--var", "value of ${NAME}; repeatable", "NAME=VALUE", default=())
    out: Path | None = option("--out", "the study's folder; default: ROOT/name of the recipe", "DIR")
    root: Path = option("--root", "folder of all cells", "DIR", default=Path("studies"))
    sets: tuple[str, ...] = option("--set", "a key of every run; repeatable", "KEY=VALUE", default=())
    seeds: tuple[int, ...] | None = option("--seeds", "other seeds", "N,N,...", _seeds)
    dry_run: bool = switch("--dry-run", "Print cells, tokens, FLOPs and hours; run nothing.")
    as_json: bool = json_switch()
    executor: str = option("--executor", "local or ray", "NAME", default="local")
    workers: int = option("--workers", "cells that run at the same time on this machine", "N", count, default=1)
    minutes: float | None = option("--minutes", "time limit, which the next command goes on from", "N", number)
    address: str = option("--address", "Ray cluster: auto, ray://HOST:PORT or local", "ADDRESS", default="auto")
    cpus: float | None = option("--cpus", "cores of each cell on a cluster", "N", number)
    gpus: float | None = option("--gpus", "GPUs of each cell on a cluster", "N", number)
    retry_failed: bool = switch("--retry-failed", "Run failed cells again.")
    keep_adapters: bool = switch("--keep-adapters", "Keep adapters of finished cells.")


@takes_options
def study(options: StudyOptions) -> None:
    """Run a grid of runs from RECIPE: tables, figures, a page.

    Cells are named by content and never run twice; repeat the command to resume.

    Example: tell study recipes/small/fig11.yaml --data ~/data --dry-run
    """
    import tell
    from tell.cli.display import make_display
    from tell.cli.output import only_json, say
    from tell.studies.executors.execution import executors

    known = executors()
    if options.executor not in known:
        raise TellError(
            f"unknown value {options.executor!r}",
            where="--executor",
            remedy=f"Use {' or '.join(known)}.",
            nearest=did_you_mean(options.executor, known),
        )
    changes = tell.Changes(_variables(options.variables), options.sets, options.seeds)
    asked: dict[str, Any] = {"data": options.data, "changes": changes, "out": options.out, "root": options.root}
    execution = tell.Execution(
        executor=options.executor,
        address=options.address,
        cpus=options.cpus,
        gpus=options.gpus,
        retry_failed=options.retry_failed,
        keep_adapters=options.keep_adapters or None,
        workers=options.workers,
        minutes=options.minutes,
    )
    if options.dry_run:
        plan = show(
            options.as_json,
            lambda display: tell.plan_study(options.recipe, execution=execution, display=display, **asked),
            lambda console, plan: console.print(plan_panel(plan)),
        )
        _say_unplanned(plan)
        return
    with only_json(options.as_json) as emit:
        folder = tell.run_study(options.recipe, execution=execution, display=make_display(), **asked)
        if options.as_json:
            emit({"folder": str(folder.root), **folder.read()})
        elif folder.page.exists():
            say(folder.page)
    if failed := folder.failed():
        names = list(failed)[:SHOWN_ERRORS]
        more = f"\n  and {len(failed) - len(names)} more" if len(failed) > len(names) else ""
        lines = "".join(f"\n  {name}: {one_line(failed[name])}" for name in names)
        typer.echo(f"{len(failed)} cells failed (--retry-failed runs them again):{lines}{more}", err=True)
        raise typer.Exit(1)


def _say_unplanned(plan: Mapping[str, Any]) -> None:
    """Print the errors that the study would meet; code 2 if no cell could run."""
    left = plan["left"]
    if not left["unplanned"]:
        return
    lines = "".join(f"\n  {one_line(error)}" for error in left["errors"][:SHOWN_ERRORS])
    typer.echo(f"{left['unplanned']:,} of {left['cells']:,} cells to do cannot be run:{lines}", err=True)
    raise typer.Exit(2 if left["unplanned"] == left["cells"] else 1)


def _variables(texts: Iterable[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise TellError(f"{text!r} is not of the form name=value", where="--var", remedy="Write --var name=value.")
        found[name] = value
    return found


def plan_panel(plan: dict) -> RenderableType:
    """The cells of a study with their costs, and totals."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from tell.cli.display import clock, short
    from tell.studies.labels import value_name
    from tell.studies.queue import span

    keys = list(dict.fromkeys(key for row in plan["cells"] for key in row["point"]))
    tails = [key.rpartition(".")[2] for key in keys]
    points = [row["point"] for row in plan["cells"]]
    shown = [[value_name(point[key], key) if key in point else "" for key in keys] for point in points]
    table = Table(title=plan["title"], title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for i, (key, tail) in enumerate(zip(keys, tails, strict=True)):
        width = max(len(values[i]) for values in shown)
        table.add_column(tail if tails.count(tail) == 1 else key, overflow="fold", min_width=min(width, 18))
    for title in ("seed", "steps", "tokens", "FLOPs", "training", "evaluation"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for row, values in zip(plan["cells"], shown, strict=True):
        costs = (f"{row['steps']:,}", short(row["tokens"]), f"{row['flops']:.2g}", clock(row["training_seconds"]))
        state = "error" if row["error"] else MARKS.get(row["state"], row["state"])
        table.add_row(
            *(row["arm"], *values, str(row["seed"])),
            *(costs if row["steps"] else [""] * len(costs)),
            *("" if row["error"] else clock(row["evaluation_seconds"]), state),
            style="red" if row["error"] or row["state"] == "failed" else "dim" if row["state"] == "done" else "",
        )
    lines = []
    for title, total in (("in all", plan["total"]), ("to do", plan["left"])):
        lines.append(
            f"{title}: {total['cells']:,} cells, {total['steps']:,} steps, {short(total['tokens'])} tokens, "
            f"{total['flops']:.3g} training FLOPs, {span(total['seconds'])}"
            + (f"; without {total['unplanned']:,} that cannot be planned" if total["unplanned"] else "")
        )
    lines += [error for error in plan["total"]["errors"] if error not in plan["left"]["errors"]]
    bases = dict.fromkeys(row["basis"] for row in plan["cells"] if row["basis"])
    times = [Text(f"times: {'; '.join(bases)}", style="dim")] if bases else []
    return Group(table, Text("\n".join(lines), style="bold"), *times)
