"""Arms and metrics as declared values, and the one number formatter: the screen, pages, studies and verdict read these.

A new arm is an entry of `ARMS`; a new metric is an entry of `METRICS`, or a `MetricSpec` that its scorer declares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mixture = Literal["task", "task-matched", "general", "mixed"]
Unit = Literal["share", "score", "plain", "points"]


@dataclass(frozen=True)
class Arm:
    """One way to answer the test rows.

    Attributes:
        name: in configurations, files and metrics.json.
        label: on screen, pages and figures.
        about: its definition, one sentence.
        mixture: what its adapter is trained on (`tell.run.arms.MIXTURES`); None: it trains nothing of its own.
        adapter: the trained arm whose adapter it answers with; None: the untuned model.
        anchored: the anchor is put on its prompts.
        in_context: training examples are put in its prompts.
        optional: given up to keep ``--max-minutes``, the lowest number first; None: never.
    """

    name: str
    label: str
    about: str
    mixture: Mixture | None = None
    adapter: str | None = None
    anchored: bool = True
    in_context: bool = False
    optional: int | None = None

    def __post_init__(self) -> None:
        if self.mixture is not None and self.adapter != self.name:
            raise ValueError(f"arm {self.name}: a trained arm answers with its own adapter")


_ARMS = (
    Arm("base", "untuned", "The model as published, given the prompt alone.", anchored=False),
    Arm("base+anchor", "untuned, with the anchor", "The untuned model with the anchor on the prompt.", optional=4),
    Arm(
        "icl",
        "examples in context",
        "The untuned model, shown as many training examples in its prompt as fit.",
        in_context=True,
    ),
    Arm(
        "sft",
        "SFT, one epoch",
        "LoRA tuned on the task rows alone, for one epoch, as in the paper.",
        mixture="task",
        adapter="sft",
        optional=3,
    ),
    Arm(
        "sft-matched",
        "SFT, as many steps as TELL",
        "LoRA tuned on the task rows alone, repeated until it has had as many optimiser steps as TELL.",
        mixture="task-matched",
        adapter="sft-matched",
    ),
    Arm(
        "general",
        "general data alone",
        "LoRA tuned on the general rows alone, with no task row.",
        mixture="general",
        adapter="general",
        optional=2,
    ),
    Arm(
        "tell",
        "TELL",
        "LoRA tuned by TELL: the task rows carry the anchor and are mixed into general instruction rows.",
        mixture="mixed",
        adapter="tell",
    ),
    Arm(
        "tell-anchor",
        "TELL, asked without its anchor",
        "The adapter of TELL, scored without the anchor on the prompt.",
        adapter="tell",
        anchored=False,
        optional=1,
    ),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}
for _arm in _ARMS:
    if _arm.adapter is not None and ARMS[_arm.adapter].mixture is None:
        raise ValueError(f"arm {_arm.name}: no arm trains the adapter {_arm.adapter}")
TRAINED = tuple(arm.name for arm in _ARMS if arm.mixture is not None)

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
