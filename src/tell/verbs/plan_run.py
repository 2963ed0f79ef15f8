"""`tell plan`: rows, tokens, cost of a run, counted without loading weights. No torch."""

from __future__ import annotations

from tell.config import Config
from tell.progress import Display
from tell.rows.row_table import RowTable
from tell.run.answers import scorer_of
from tell.run.arms import wanted_arms
from tell.run.constrained import check_constraint
from tell.run.general_rows import General, read_general
from tell.run.plan import describe_plan, unwritten_general
from tell.run.prepare import check_tests, prepare
from tell.run.task import Task, anchor_of, load_task, placed_anchor
from tell.run.time_budget import fit_minutes


def plan(config: Config, *, display: Display | None = None) -> dict:
    """The plan of a run, counted without loading weights.

    Args:
        config: as for `tell.tune`.

    Returns:
        The content of ``plan.json``. With ``general: self`` and nothing written yet, the general part is an
        estimate and says so; so is the anchor's length with ``anchor: auto``. ``max_minutes`` uses the
        recorded speed, while a run measures it again.

    Raises:
        TellError: bad data, model or configuration.
    """
    task = load_task(config, display)
    scorer_of(config, task.kind)  # refused by `tune` too
    wanted_arms(config)
    if anchor_of(config) is None:
        task.notices.add("the model will write the anchor; a placeholder of similar length is counted")
    anchor = placed_anchor(task)
    check_tests(task, anchor)
    prepared = prepare(task, anchor, _general)
    check_constraint(prepared.task)
    if config.max_minutes:
        extent, given_up = fit_minutes(prepared, minutes=config.max_minutes, spent=0.0)
        for text in given_up:
            task.notices.add(text)
        prepared = extent.apply(prepared)
    return describe_plan(prepared)


def _general(task: Task, table: RowTable) -> General | None:
    """General rows of a source, of an earlier run, or an estimate."""
    # Overlap with the test rows takes the longest by far, and changes counts only where rows are dropped.
    return read_general(task, overlap=task.config.task.drop_overlap) or unwritten_general(task, table)
