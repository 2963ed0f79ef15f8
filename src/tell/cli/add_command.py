"""``tell add``: more rows for a run, and a comparison with the run before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tell.cli.common import argument, json_switch, option, show, switch, takes_options, trust_switch
from tell.errors import TellError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from tell.progress import Display


@dataclass(frozen=True)
class AddOptions:
    run: Path = argument("RUN", "run folder")
    data: str = argument("FILE", "new rows, in the layout of the run's data")
    out: Path | None = option("--out", "folder of the new run; default: RUN with the next number", "DIR")
    plan: bool = switch("--plan", "Count what would be done, and write nothing.")
    resume: bool = switch("--resume", "Continue an interrupted addition in --out.")
    overwrite: bool = switch("--overwrite", "Replace a run in --out.")
    trust_remote_code: bool = trust_switch()
    trust_scorer: bool = switch("--trust-scorer", "score by the run's own function (task.scorer)")
    as_json: bool = json_switch()


@takes_options
def add(options: AddOptions) -> None:
    """Train a run again with more rows, and compare.

    Old test rows stay test rows; new rows are split; both runs are compared on the same test rows.

    Example: tell add runs/tickets-1 more.csv
    """
    if sum((options.plan, options.resume, options.overwrite)) > 1:
        raise TellError("give at most one", where="--plan, --resume and --overwrite", remedy="Leave out the others.")
    from tell.cli.tune_command import command_line
    from tell.run.claim import Trust

    trust = Trust(options.trust_remote_code, options.trust_scorer)
    if options.plan:
        from tell.cli.tables import plan_box
        from tell.verbs.add_rows import plan_addition

        show(
            options.as_json,
            lambda display: plan_addition(options.run, options.data, trust=trust, display=display),
            lambda console, found: console.print(plan_box(found)),
        )
        return
    import tell

    start: Literal["new", "resume", "overwrite"] = (
        "resume" if options.resume else "overwrite" if options.overwrite else "new"
    )

    def work(display: Display) -> dict:
        folder = tell.add(
            options.run,
            options.data,
            out=options.out,
            start=start,
            trust=trust,
            display=display,
            command=command_line(),
        )
        return {"out": str(folder.root), **folder.read(folder.added)}

    show(options.as_json, work, show_added)


def show_added(console: Console, found: dict) -> None:
    """The new run's results, and both runs on the old and on the new test rows."""
    from tell.cli.tables import show_run
    from tell.folder import RunFolder

    show_run(console, RunFolder(found["out"]))
    if (table := added_table(found)) is not None:
        console.print(table)


def added_table(found: dict) -> RenderableType | None:
    """Old, new and the paired difference of a few metrics on both sets of test rows."""
    from rich.table import Table

    from tell.cli.tables import METRICS_SHOWN
    from tell.metric_names import metric
    from tell.number_text import as_typed, show, show_interval

    sides = {"old test rows": found.get("old_test"), "new test rows": found.get("new_test")}
    table = Table(title=f"{found['arm']} against {found['run']}", title_justify="left", header_style="bold")
    for title in ("", "metric", "before", "now", "difference, 95 % interval", "rows"):
        table.add_column(title, justify="left" if title in ("", "metric") else "right")
    for side, numbers in ((side, numbers or {}) for side, numbers in sides.items()):
        names = [name for name in numbers if ":" not in name]
        names.sort(key=lambda name: name != found.get("primary"))
        for name in names[:METRICS_SHOWN]:
            spec, entry = metric(name), numbers[name]
            gap = entry["difference"]
            shown = [show(entry[key]["value"], spec.unit) for key in ("old", "new")]
            limits = f"{show(gap['value'], spec.gap_unit, sign=True)} [{show_interval(gap['ci'], spec.gap_unit)}]"
            table.add_row(side, spec.phrase, *map(as_typed, (*shown, limits)), f"{gap['n']:,}")
    return table if table.row_count else None
