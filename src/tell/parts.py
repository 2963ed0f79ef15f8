"""Parts of the method as declared values: each by the pairs of arms that differ by it."""

from __future__ import annotations

from dataclasses import dataclass

from tell.names import ARMS


@dataclass(frozen=True)
class Part:
    """One part of the method, and the pairs of arms that differ by it: the first has it, the second lacks it."""

    label: str
    about: str
    pairs: tuple[tuple[str, str], ...]


PARTS = (
    Part(
        "Readout",
        "Closed fields are decided, by the model and a classifier on the untuned model's hidden states.",
        (("tell", "tell-free"), ("sft-readout", "sft-matched"), ("icl-readout", "icl")),
    ),
    Part(
        "General rows",
        "The task rows are mixed into general rows, instead of being repeated alone for as many steps.",
        (("tell", "sft-readout"), ("tell-free", "sft-matched")),
    ),
    Part(
        "Selected general rows",
        "The general rows are those nearest to the task rows, instead of random ones.",
        (("tell-selected", "tell"),),
    ),
    Part(
        "Recast general rows",
        "Half of the general rows are turned by rule into the form of the task.",
        (("tell-recast", "tell"),),
    ),
    Part(
        "Constraint",
        "Answers are constrained to the task's schema or labels, instead of being written freely.",
        (("tell+schema", "tell"), ("base+schema", "base"), ("icl+schema", "icl")),
    ),
    Part("Anchor", "The anchor is on the prompt.", (("tell", "tell-anchor"),)),
    Part(
        "Self-distillation",
        "General rows are trained on the untuned model's distributions instead of their text.",
        (("tell-distilled", "tell"),),
    ),
    Part(
        "Weight averaging",
        "The weights are averaged over the last quarter of the steps.",
        (("tell-averaged", "tell"), ("sft-averaged", "sft-readout")),
    ),
    Part(
        "Loss on prompts",
        "Prompts are trained on too.",
        (("tell-prompts", "tell"), ("sft-prompts", "sft-readout")),
    ),
    Part(
        "Exemplars in training",
        "In every other repetition of a task row its prompt shows other task rows.",
        (("tell-exemplars", "tell"), ("sft-exemplars", "sft-readout")),
    ),
    Part(
        "Exemplars at test time",
        "An adapter trained with exemplars is shown training examples in the test prompt.",
        (("tell-exemplars-icl", "tell-exemplars"), ("sft-exemplars-icl", "sft-exemplars")),
    ),
    Part(
        "Readout into weights",
        "Unlabelled prompts, answered with the readout, are further training rows.",
        (("tell-pseudo-free", "tell-free"), ("sft-pseudo-free", "sft-matched"), ("tell-pseudo", "tell")),
    ),
)
"""What "what each part brought" compares; each ingredient is given to the control too where it can be."""
for _one, _other in (_pair for _part in PARTS for _pair in _part.pairs):
    if _one not in ARMS or _other not in ARMS:
        raise ValueError(f"a part compares {_one} with {_other}, and one of them is no arm")
