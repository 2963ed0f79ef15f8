"""``tell eval``: score a run's arms again, on other rows or with other decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tell.cli.common import arms as read_arms
from tell.cli.common import read_number


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder", show_default=False)],
    arms: Annotated[
        str | None, typer.Option("--arms", metavar="A,B,...", help="arms to score; default: those of the run")
    ] = None,
    test: Annotated[str | None, typer.Option("--test", metavar="FILE", help="score on these rows instead")] = None,
    rows: Annotated[str | None, typer.Option("--rows", metavar="N", help="score at most this many rows")] = None,
    greedy: Annotated[bool | None, typer.Option("--greedy/--no-greedy", help="decode greedily")] = None,
    seed: Annotated[str | None, typer.Option("--seed", metavar="N", help="seed of the decoding")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any key of the run; repeatable")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> None:
    """Score the arms of a run, with intervals."""
    wanted = None if arms is None else read_arms(arms)
    limit, chosen = read_number("--rows", rows), read_number("--seed", seed)
    import tell
    from tell.cli.display import make_display
    from tell.cli.output import only_json
    from tell.cli.tables import make_console, show_metrics

    with only_json(as_json) as emit:
        metrics = tell.evaluate(
            run,
            arms=wanted,
            test=test,
            greedy=greedy,
            seed=chosen,
            rows=limit,
            overrides=tuple(sets or ()),
            display=make_display(),
        )
        if as_json:
            emit(metrics)
        else:
            show_metrics(make_console(), metrics)
