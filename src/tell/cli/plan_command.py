"""``tell plan``: what a run would do, without loading weights."""

from __future__ import annotations

from dataclasses import dataclass

from tell.cli.common import Given, json_switch, show, takes_options


@dataclass(frozen=True)
class PlanOptions:
    as_json: bool = json_switch()


@takes_options
def plan(given: Given, options: PlanOptions) -> None:
    """Count what `tell tune DATA` would do, without loading weights.

    Rows, tokens, steps, FLOPs, time and memory; takes the flags of `tell tune`.
    """
    config = given.load("plan")
    import tell
    from tell.cli.tables import plan_box

    show(
        options.as_json,
        lambda display: tell.plan(config, display=display),
        lambda console, found: console.print(plan_box(found)),
    )
