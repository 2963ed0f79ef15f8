"""The scorer for a kind of task."""

from __future__ import annotations

from collections.abc import Sequence

from tell.errors import TellError
from tell.score.custom import CustomScorer
from tell.score.json_schema import JsonScorer
from tell.score.label import LabelScorer
from tell.score.scored import Scorer
from tell.score.text import TextScorer

KINDS = ("json", "label", "text")


def make_scorer(
    kind: str,
    *,
    schema: dict | None = None,
    labels: Sequence[str] | None = None,
    custom: str | None = None,
    bleurt: str | None = None,
) -> Scorer:
    """The scorer for ``kind`` (json, label or text), or the user's own where ``custom`` names one.

    Args:
        schema: JSON Schema, needed for json.
        labels: the known labels, needed for label.
        custom: ``package.module:function``; it scores whatever the kind is.
        bleurt: a BLEURT checkpoint, for text alone.

    Raises:
        TellError: an unknown kind, a missing or invalid schema, missing labels, a function or a checkpoint not found.
    """
    if bleurt is not None and (custom is not None or kind != "text"):
        other = "task.scorer" if custom is not None else f"kind {kind}"
        raise TellError(f"{other} is not scored by BLEURT", where="eval.bleurt", remedy="Leave it out.")
    if custom is not None:
        return CustomScorer(custom)
    if kind == "json":
        if schema is None:
            raise TellError("kind json needs a JSON Schema", where="task.schema", remedy="Give one with --schema.")
        return JsonScorer(schema)
    if kind == "label":
        return LabelScorer(labels or ())
    if kind == "text":
        return TextScorer(bleurt)
    raise TellError(f"kind {kind!r} is unknown", where="task.kind", remedy=f"Use {', '.join(KINDS)} or auto.")
