"""Limits of decoding: new tokens that fit into the context, rows that fit into memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tell.errors import TellError
from tell.pass_memory import SHARE
from tell.train.attention import PackedPlan, Rule, use_plan


def answer_limits(
    prompts: Sequence[Sequence[int]], most: int, limits: Sequence[int] | None, max_positions: int
) -> list[int]:
    """The most new tokens of each prompt.

    Args:
        prompts: token ids.
        most: of every prompt where there are no ``limits``.
        limits: of each prompt.
        max_positions: most tokens of prompt and answer together.

    Raises:
        TellError: a prompt leaves no room for an answer.
        ValueError: ``limits`` are not one positive number per prompt.
    """
    wanted = [most] * len(prompts) if limits is None else list(limits)
    if len(wanted) != len(prompts) or min(wanted, default=1) < 1:
        raise ValueError(f"{len(wanted)} limits for {len(prompts)} prompts, each must be at least 1")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) >= max_positions:
            raise TellError(
                f"the prompt has {len(prompt):,} tokens and the model takes {max_positions:,}",
                where=f"prompt {number}",
                remedy="Shorten the prompt, or use fewer in-context examples.",
            )
    return [min(n, max_positions - len(prompt)) for n, prompt in zip(wanted, prompts, strict=True)]


class _Sizes(PackedPlan):
    """One token; sums the sizes of the keys and values of all attention calls of a pass."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__([1], device=device)
        self.bytes = 0

    def attend(self, layer: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        self.bytes += key.nbytes + value.nbytes
        return super().attend(layer, query, key, value, rule)


def token_bytes(core: nn.Module, device: torch.device | str) -> int:
    """Bytes of one token's keys and values, in all attention calls of a transformer body.

    Measured in a pass rather than read from the configuration: layers differ in width (Gemma 4), and some call
    attention twice (DiffLlama).
    """
    plan = _Sizes(device)
    with use_plan(plan):
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        core(input_ids=ids, position_ids=plan.positions(), use_cache=False)
    return plan.bytes


def rows_that_fit(wanted: int, capacity: int, bytes_a_token: int, free: int) -> int:
    """``wanted`` rows of ``capacity`` tokens, or as many as fit into a share of ``free`` bytes, at least one."""
    return max(1, min(wanted, free // SHARE // (capacity * bytes_a_token)))
