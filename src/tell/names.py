"""Arms as declared values: used by the screen, pages, studies and verdict. The parts they differ by: `tell.parts`.

A new arm is an entry of ``_ARMS``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tell.arm import Arm, ingredient

_EXEMPLARS: Mapping[str, object] = {"mix.exemplars": 3}
PSEUDO = {"mix.pseudo": 4}
"""What arms with pseudo-labelled rows are trained with where the run sets no other amount."""


_CONSTRAINED: Mapping[str, Any] = {"constrained": True, "standard": False, "optional": 8}
"""Not among the standard arms: each answers all test rows once more, the untuned model up to the limit of tokens."""


_ARMS = (
    Arm(
        "base",
        "untuned",
        "the untuned model",
        "The model as published, given the prompt alone.",
        "grey",
        "X",
        anchored=False,
        dashes=(1.5, 2),
    ),
    Arm(
        "base+anchor",
        "untuned, with the anchor",
        "the untuned model with the anchor",
        "The untuned model with the anchor on the prompt.",
        "grey",
        "P",
        optional=4,
        dashes=(4, 2),
    ),
    Arm(
        "base+schema",
        "untuned, constrained",
        "the untuned model with constrained answers",
        "The untuned model, given the prompt alone, its answers constrained to the task's schema or labels.",
        "grey",
        "D",
        anchored=False,
        dashes=(3, 1),
        **_CONSTRAINED,
    ),
    Arm(
        "icl",
        "examples in context",
        "the untuned model with examples in context",
        "The untuned model, shown as many training examples in its prompt as fit.",
        "ochre",
        "v",
        in_context=True,
        rival=6,
    ),
    Arm(
        "icl+schema",
        "examples in context, constrained",
        "the untuned model with examples in context and constrained answers",
        "The untuned model with examples in context, its answers constrained to the task's schema or labels.",
        "ochre",
        "D",
        in_context=True,
        rival=8,
        dashes=(3, 1),
        **_CONSTRAINED,
    ),
    Arm(
        "icl-readout",
        "examples in context, with the readout",
        "the untuned model with examples in context and the readout",
        "The untuned model with examples in context, its closed fields decided with the readout.",
        "ochre",
        "^",
        in_context=True,
        decides=True,
        optional=6,
        rival=4,
        dashes=(4, 2),
    ),
    Arm(
        "sft",
        "SFT, one epoch",
        "SFT",
        "LoRA tuned on the task rows alone, for one epoch, as in the paper.",
        "orange",
        "s",
        mixture="task",
        adapter="sft",
        optional=3,
        rival=5,
    ),
    Arm(
        "sft-matched",
        "SFT, as many steps as TELL",
        "step-matched SFT",
        "LoRA tuned on the task rows alone, repeated until it has had as many optimiser steps as TELL.",
        "pink",
        "D",
        mixture="task-matched",
        adapter="sft-matched",
        rival=3,
    ),
    Arm(
        "sft-readout",
        "SFT, as many steps, with the readout",
        "step-matched SFT with the readout",
        "The adapter of step-matched SFT, its closed fields decided with the readout, as TELL's are.",
        "pink",
        "d",
        adapter="sft-matched",
        decides=True,
        optional=7,
        rival=2,
        dashes=(4, 2),
    ),
    Arm(
        "sft-tuned",
        "SFT, searched",
        "SFT with searched settings",
        "LoRA tuned on the task rows alone; its learning rate, repetitions and decoding are searched as TELL's are.",
        "orange",
        "D",
        mixture="task-repeated",
        adapter="sft-tuned",
        decides=True,
        searched=True,
        standard=False,
        optional=8,
        rival=1,
    ),
    Arm(
        "general",
        "general data alone",
        "tuning on general data alone",
        "LoRA tuned on the general rows alone, with no task row.",
        "green",
        "^",
        mixture="general",
        adapter="general",
        standard=False,
        optional=2,
        rival=7,
    ),
    Arm(
        "tell",
        "TELL",
        "TELL",
        "LoRA tuned by TELL: the task rows carry the anchor and are mixed into general instruction rows. Closed fields "
        "are decided with the readout.",
        "blue",
        "o",
        mixture="mixed",
        adapter="tell",
        decides=True,
        searched=True,
    ),
    ingredient(
        "tell-distilled",
        "TELL, general rows distilled",
        "TELL with distilled general rows",
        "TELL, its general rows trained on the untuned model's next-token distributions instead of their text.",
        "green",
        "o",
        mixture="mixed",
        settings={"train.general_target": "untuned"},
    ),
    ingredient(
        "tell-averaged",
        "TELL, averaged weights",
        "TELL with averaged weights",
        "TELL, the mean of its weights over the last quarter of the steps instead of the last ones.",
        "violet",
        "o",
        mixture="mixed",
        settings={"train.average": 0.25},
    ),
    ingredient(
        "sft-averaged",
        "SFT, as many steps, averaged weights",
        "step-matched SFT with averaged weights",
        "Step-matched SFT with the readout, the mean of its weights over the last quarter of the steps.",
        "violet",
        "d",
        mixture="task-matched",
        settings={"train.average": 0.25},
        dashes=(4, 2),
    ),
    ingredient(
        "tell-prompts",
        "TELL, trained on prompts too",
        "TELL trained on prompts too",
        "TELL, its loss on every token of prompts and answers instead of on answers alone.",
        "ochre",
        "o",
        mixture="mixed",
        settings={"train.loss_on": "all"},
    ),
    ingredient(
        "sft-prompts",
        "SFT, as many steps, trained on prompts too",
        "step-matched SFT trained on prompts too",
        "Step-matched SFT with the readout, its loss on every token of prompts and answers.",
        "ochre",
        "d",
        mixture="task-matched",
        settings={"train.loss_on": "all"},
        dashes=(4, 2),
    ),
    ingredient(
        "tell-selected",
        "TELL, nearest general rows",
        "TELL with the nearest general rows",
        "TELL with the general rows that are nearest to the task rows, instead of random ones.",
        "blue",
        "*",
        mixture="mixed",
        settings={"general.select": "similar"},
        dashes=(6, 2),
    ),
    ingredient(
        "tell-recast",
        "TELL, general rows recast",
        "TELL with recast general rows",
        "TELL with half of the general rows turned by rule into the form of the task.",
        "blue",
        "p",
        mixture="mixed",
        settings={"general.recast": 0.5},
        dashes=(3, 1),
    ),
    Arm(
        "tell-free",
        "TELL, without the readout",
        "TELL without the readout",
        "The adapter of TELL, its closed fields written as freely as the other text.",
        "blue",
        "h",
        adapter="tell",
        optional=5,
        dashes=(1.5, 2),
    ),
    Arm(
        "tell+schema",
        "TELL, constrained",
        "TELL with constrained answers",
        "The adapter of TELL, its answers constrained to the task's schema or labels; closed fields are decided within "
        "them.",
        "blue",
        "D",
        adapter="tell",
        decides=True,
        dashes=(3, 1),
        **_CONSTRAINED,
    ),
    Arm(
        "tell-anchor",
        "TELL, prompted without its anchor",
        "TELL without its anchor",
        "The adapter of TELL, scored without the anchor on the prompt.",
        "blue",
        "o",
        adapter="tell",
        anchored=False,
        decides=True,
        optional=1,
        dashes=(4, 2),
    ),
    ingredient(
        "tell-exemplars",
        "TELL, trained with exemplars",
        "TELL trained with exemplars",
        "TELL, every other repetition of a task row with other task rows in its prompt. Tested without them.",
        "blue",
        "X",
        mixture="mixed",
        settings=_EXEMPLARS,
    ),
    ingredient(
        "tell-exemplars-icl",
        "TELL, trained and tested with exemplars",
        "TELL trained and tested with exemplars",
        "The adapter of TELL trained with exemplars, shown as many training examples in its prompt as fit.",
        "blue",
        "v",
        adapter="tell-exemplars",
        in_context=True,
        dashes=(4, 2),
    ),
    ingredient(
        "sft-exemplars",
        "SFT, as many steps, trained with exemplars",
        "step-matched SFT trained with exemplars",
        "Step-matched SFT with the readout, every other repetition of a task row with other task rows in its prompt. "
        "Tested without them.",
        "pink",
        "X",
        mixture="task-matched",
        settings=_EXEMPLARS,
    ),
    ingredient(
        "sft-exemplars-icl",
        "SFT, as many steps, trained and tested with exemplars",
        "step-matched SFT trained and tested with exemplars",
        "The adapter of step-matched SFT trained with exemplars, shown as many training examples in its prompt as fit.",
        "pink",
        "v",
        adapter="sft-exemplars",
        in_context=True,
        dashes=(4, 2),
    ),
    ingredient(
        "tell-pseudo",
        "TELL, with pseudo-labelled rows",
        "TELL with pseudo-labelled rows",
        "LoRA tuned by TELL, with unlabelled prompts of the task that TELL has answered as further rows. Closed fields "
        "are decided with the readout.",
        "violet",
        "o",
        mixture="pseudo",
        settings=PSEUDO,
        teacher="tell",
    ),
    ingredient(
        "tell-pseudo-free",
        "TELL, with pseudo-labelled rows, without the readout",
        "TELL with pseudo-labelled rows, without the readout",
        "The adapter of TELL with pseudo-labelled rows, its closed fields written as freely as the other text, as any "
        "other server does.",
        "violet",
        "h",
        adapter="tell-pseudo",
        dashes=(1.5, 2),
        decides=False,
    ),
    ingredient(
        "sft-pseudo",
        "SFT, as many steps, with pseudo-labelled rows and the readout",
        "step-matched SFT with pseudo-labelled rows and the readout",
        "LoRA tuned on the task rows and on unlabelled prompts that step-matched SFT has answered with the readout, "
        "for as many optimiser steps as TELL. Closed fields are decided with the readout.",
        "ochre",
        "D",
        mixture="pseudo-matched",
        settings=PSEUDO,
        teacher="sft-matched",
    ),
    ingredient(
        "sft-pseudo-free",
        "SFT, as many steps, with pseudo-labelled rows",
        "step-matched SFT with pseudo-labelled rows",
        "The adapter of step-matched SFT with pseudo-labelled rows, its closed fields written as freely as the other "
        "text.",
        "ochre",
        "d",
        adapter="sft-pseudo",
        dashes=(1.5, 2),
        decides=False,
    ),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}
if len(ARMS) < len(_ARMS):
    raise ValueError("an arm is declared twice")
for _arm in _ARMS:
    if _arm.adapter is not None and ARMS[_arm.adapter].mixture is None:
        raise ValueError(f"arm {_arm.name}: no arm trains the adapter {_arm.adapter}")
    if _arm.teacher is not None and (ARMS[_arm.teacher].mixture is None or ARMS[_arm.teacher].teacher is not None):
        raise ValueError(f"arm {_arm.name}: {_arm.teacher} cannot be its teacher")
TRAINED = tuple(arm.name for arm in _ARMS if arm.mixture)
RIVALS = tuple(a.name for a in sorted((a for a in _ARMS if a.rival), key=lambda a: a.rival or 0))


def arm(name: str) -> Arm:
    """An arm by its name; one that is unknown (of a folder that another version wrote) is called by its name."""
    return ARMS.get(name) or Arm(name, name, name, "", "violet", "o")


def arm_order(names: Iterable[str]) -> list[str]:
    """Each name once: known arms in the order of `ARMS`, then the others as they came."""
    known = list(ARMS)
    return sorted(dict.fromkeys(names), key=lambda name: known.index(name) if name in ARMS else len(known))
