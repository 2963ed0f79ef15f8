"""Choosing the anchor of a run whose model writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tell.anchor.anchor import Anchor, Place
from tell.run.anchor_candidates import Candidate, write_anchor_candidates
from tell.run.memo import once
from tell.run.session import Session
from tell.run.task import Task, limited_rows, place_anchor, stand_in_anchor


def choose_anchor(task: Task, session: Session) -> tuple[Anchor, list[dict]]:
    """The anchor the model writes for a task, placed where its template can carry it, and all candidates.

    Only rows within the task's budget are shown to the model: a budget of 15 rows covers the anchor too.
    """
    place, candidates = anchor_candidates(task, session)
    best = candidates[0]
    return Anchor(best.text, place, best.origin), [c.to_dict() for c in candidates]


def anchor_candidates(task: Task, session: Session, compare: Sequence[str] = ()) -> tuple[Place, list[Candidate]]:
    """The place where the anchor can go, and its candidates, lowest loss first.

    Args:
        compare: hand-written texts that compete too.
    """
    stand_in = place_anchor(task, stand_in_anchor(task))
    train = limited_rows(task, stand_in)
    anchor = task.config.anchor.model_copy(update={"place": stand_in.place})
    config = task.config.model_copy(update={"anchor": anchor})
    shown = [e.hash for e in train], [e.hash for e in task.validation], task.kind, list(compare)
    parts = config.model_dump(
        mode="json", include={"anchor": True, "generate": True, "seed": True, "train": {"max_length", "micro_tokens"}}
    )
    key = repr(("anchor", parts, *shown))  # shared by cells of a study that differ only in other settings
    placed = replace(task, config=config, train=train)
    found = once(session.model, key, lambda: write_anchor_candidates(placed, session, compare))
    return stand_in.place, found
