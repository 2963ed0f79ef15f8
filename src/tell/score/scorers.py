"""The scorer of a task. A kind of scorer is a class with `tell.score.scored.scorer` on it, imported here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tell.errors import TellError
from tell.score import json_schema, label, multi_label, text  # noqa: F401  (register their scorers)
from tell.score.custom import CustomScorer
from tell.score.scored import KINDS, ScoredTask, Scorer


def make_scorer(
    kind: str,
    *,
    schema: dict[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    custom: str | None = None,
    bleurt: str | None = None,
    form: str | None = None,
) -> Scorer:
    """The scorer for ``kind`` (json, label, labels or text), or the user's own if ``custom`` names one.

    Args:
        schema: JSON Schema, needed for json.
        labels: the known labels, needed for label and labels.
        custom: ``package.module:function``, for any kind.
        bleurt: a BLEURT checkpoint, for text alone.
        form: how labels are listed (`tell.data.label_text.FORMS`), needed for labels.

    Raises:
        TellError: an unknown kind, a missing or invalid schema, missing labels, a function or a checkpoint not found.
    """
    if kind not in KINDS:
        raise TellError(f"unknown kind {kind!r}", where="task.kind", remedy=f"Use {', '.join(KINDS)} or auto.")
    if bleurt is not None and (custom is not None or "bleurt" not in KINDS[kind].metrics):
        other = "task.scorer" if custom is not None else f"kind {kind}"
        raise TellError(f"{other} is not scored by BLEURT", where="eval.bleurt", remedy="Leave it out.")
    if custom is not None:
        return CustomScorer(custom)
    return KINDS[kind].made_by.of(ScoredTask(schema, tuple(labels or ()), bleurt, form or "json"))
