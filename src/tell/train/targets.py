"""Names that LoRA must not target. No torch here, so that `tell plan` can refuse them."""

from __future__ import annotations

from collections.abc import Iterable

from tell.errors import TellError

EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})  # what peft takes for experts


def refuse_experts(names: Iterable[str]) -> None:
    """Refuse targets that name the experts of a mixture, which transformers keeps as one tensor.

    Raises:
        TellError: one of the names does.
    """
    if taken := sorted(EXPERTS.intersection(names)):
        raise TellError(
            f"{', '.join(taken)} would name the experts, which are one tensor and cannot be adapted",
            where="train.lora_targets",
            remedy="Use all-linear, which leaves the experts out, or qkv.",
        )
