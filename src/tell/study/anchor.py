"""`tell anchor`: let the model write, score and choose an anchor, without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tell.anchor.anchor import Anchor
from tell.config import Config
from tell.progress import Display, Silent
from tell.study.prepare import Task, limited_rows, load_task, place_anchor, stand_in_anchor
from tell.study.session import load_engine


def choose_anchor(
    task: Task, model: Any, engine: Any, display: Display, check: Callable[[], None] = lambda: None
) -> tuple[Anchor, list[dict]]:
    """The anchor the model writes for a task, placed where its template can carry it; and all candidates.

    Only rows within the task's budget are shown to the model: 15 rows are 15 rows. `task` stays as it is.
    """
    from tell.anchor.write import write_anchor_candidates

    stand_in = place_anchor(task, stand_in_anchor(task), display)
    train = limited_rows(task, stand_in)
    config = task.config.model_copy(update={"anchor": task.config.anchor.model_copy(update={"place": stand_in.place})})
    return write_anchor_candidates(config, task.chat, model, engine, train, task.validation, task.kind, display, check)


def write_anchor(config: Config, *, display: Display | None = None) -> dict:
    """Candidates for the anchor, scored, the best first.

    Args:
        config: as for `tell.tune`; ``anchor.text`` is ignored.

    Returns:
        The content of ``anchor.json``: text, place, origin, hash, candidates.

    Raises:
        TellError: bad data or model.
    """
    display = display or Silent()
    task = load_task(config, display)
    loaded, engine = load_engine(task.files, config)
    anchor, candidates = choose_anchor(task, loaded.model, engine, display)
    return {**anchor.to_dict(), "candidates": candidates}
