"""What people call each metric and how it is written; the one table for the verdict, the screen and the page."""

from __future__ import annotations

from typing import Literal

Unit = Literal["share", "score", "plain"]

OF_100 = frozenset({"chrf", "bleu"})
ANSWER_LOSS = "answer_loss"
LOSSES = frozenset({ANSWER_LOSS})
"""In nats a token: no shares, and lower is better."""
PLAIN = LOSSES | {"bleurt"}
"""Written as they are: neither shares nor out of 100."""
NAMES = {
    "schema_adherence": "schema adherence",
    "valid_json": "valid JSON",
    "field_accuracy": "field accuracy",
    "exact_match": "exact match",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "valid_label": "valid label",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF++",
    "bleu": "BLEU",
    "bleurt": "BLEURT",
    "answer_loss": "answer loss",
}


def unit_of(metric: str) -> Unit:
    """How values of a metric are written: ``share`` in per cent, ``score`` out of 100, ``plain`` as they are.

    A user's own metric is plain, since nothing is known of its range.
    """
    if metric in OF_100:
        return "score"
    return "share" if metric.startswith("field:") or (metric in NAMES and metric not in PLAIN) else "plain"


HELD_OUT, PROBE, WITNESS = "general held out", "probe", "witness"  # sets of general rows; the last two are in no mix
