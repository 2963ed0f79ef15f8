"""``tell plan``: what a run would do, without loading weights."""

from __future__ import annotations

from typing import Annotated

import typer

from tell.cli.common import Given, configured


@configured("plan")
def plan(
    given: Given,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> None:
    """Count what `tell tune DATA` would do, without loading weights.

    Rows, tokens, steps, FLOPs, time and memory; takes the flags of `tell tune`.
    """
    config = given.load("plan")
    import tell
    from tell.cli.display import make_console, make_display
    from tell.cli.output import only_json
    from tell.cli.tables import plan_box

    with only_json(as_json) as emit:
        result = tell.plan(config, display=make_display())
        if as_json:
            emit(result)
        else:
            make_console().print(plan_box(result))
