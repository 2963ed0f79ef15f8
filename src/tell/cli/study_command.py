"""``tell study``: a grid of runs from a recipe, to tables, figures and a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tell.cli.common import count, number, one_of, read_number
from tell.errors import TellError
from tell.shown import one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN_ERRORS = 20
MARKS = {"waiting": "", "done": "✓", "failed": "✗"}


def study(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file of the study", show_default=False)],
    data: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="folder of ${data}")] = None,
    variables: Annotated[
        list[str] | None, typer.Option("--var", metavar="NAME=VALUE", help="another variable; repeatable")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="the study's folder; default: ROOT/name of the recipe")
    ] = None,
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="folder of all cells")] = Path("studies"),
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a key of every run; repeatable")
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="N,N,...", help="other seeds")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print cells, tokens, FLOPs and hours; run nothing.")] = (
        False
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
    executor: Annotated[str, typer.Option("--executor", metavar="NAME", help="local or ray")] = "local",
    address: Annotated[
        str, typer.Option("--address", metavar="ADDRESS", help="of the Ray cluster: auto, ray://HOST:PORT or local")
    ] = "auto",
    cpus: Annotated[str | None, typer.Option("--cpus", metavar="N", help="cores of each cell on a cluster")] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", metavar="N", help="GPUs of each cell on a cluster")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    keep_adapters: Annotated[bool, typer.Option("--keep-adapters", help="Keep adapters of finished cells.")] = False,
) -> None:
    """Run a grid of runs from RECIPE: tables, figures, a page.

    Cells are named by content and never run twice; give the same command again to go on where it was stopped.

    Example: tell study recipes/small/fig11.yaml --data ~/data --dry-run
    """
    import tell
    from tell.cli.display import make_console, make_display
    from tell.cli.output import only_json, say
    from tell.studies.executors.registry import executors

    one_of("--executor", *executors())(executor)
    execution = tell.Execution(
        executor=executor,
        address=address,
        cpus=read_number("--cpus", cpus, number),
        gpus=read_number("--gpus", gpus, number),
        retry_failed=retry_failed,
        keep_adapters=keep_adapters or None,
    )
    changes = tell.Changes(_variables(variables or ()), tuple(sets or ()), None if seeds is None else _seeds(seeds))
    options: dict[str, Any] = {"data": data, "changes": changes, "out": out, "root": root}

    with only_json(as_json) as emit:
        if dry_run:
            plan = tell.plan_study(recipe, retry_failed=retry_failed, display=make_display(), **options)
            if as_json:
                emit(plan)
            else:
                make_console().print(plan_panel(plan))
            _say_unplanned(plan)
            return
        folder = tell.run_study(recipe, execution=execution, display=make_display(), **options)
        if as_json:
            emit({"folder": str(folder.root), **folder.read()})
        elif folder.page.exists():
            say(folder.page)
    failed = folder.failed()
    if failed:
        names = list(failed)[:SHOWN_ERRORS]
        more = f"\n  and {len(failed) - len(names)} more" if len(failed) > len(names) else ""
        lines = "".join(f"\n  {name}: {one_line(failed[name])}" for name in names)
        typer.echo(f"{len(failed)} cells failed (--retry-failed runs them again):{lines}{more}", err=True)
        raise typer.Exit(1)


def _say_unplanned(plan: Mapping[str, Any]) -> None:
    """What the study would run into; code 2 where it could run nothing at all.

    Raises:
        typer.Exit: cells that are to be run cannot be planned.
    """
    left = plan["left"]
    if not left["unplanned"]:
        return
    lines = "".join(f"\n  {one_line(error)}" for error in left["errors"][:SHOWN_ERRORS])
    typer.echo(f"{left['unplanned']:,} of {left['cells']:,} cells to do cannot be run:{lines}", err=True)
    raise typer.Exit(2 if left["unplanned"] == left["cells"] else 1)


def _variables(texts: tuple[str, ...] | list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise TellError(f"{text!r} is not of the form name=value", where="--var", remedy="Write --var name=value.")
        found[name] = value
    return found


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(count(part) for part in text.split(",") if part.strip())
    except ValueError:
        seeds = ()
    if not seeds:
        raise TellError(f"{text!r} is no list of seeds", where="--seeds", remedy="Write e.g. 42,43,44.")
    return seeds


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
