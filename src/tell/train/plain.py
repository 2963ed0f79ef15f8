"""The plain path: padded micro-batches through transformers and peft as they are, with all logits.

What the fast path is measured and tested against, and what ``--fast off`` trains with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tell.train.attention import install, restore, use_plan
from tell.train.fast.fused import fuse_modules, is_fused, unfuse_modules
from tell.train.loss import position_weights
from tell.train.packing import TrainRow
from tell.train.step import Pass, StepLoss, accumulate, batch_total, row_means
from tell.train.transfer import send


def padded_batches(rows: Sequence[TrainRow], micro_tokens: int) -> list[list[TrainRow]]:
    """Rows of a step by falling length, in groups whose padded size stays within ``micro_tokens``."""
    groups: list[list[TrainRow]] = []
    for row in sorted(rows, key=lambda r: -len(r.ids)):
        if groups and len(groups[-1][0].ids) * (len(groups[-1]) + 1) <= micro_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class PaddedRows:
    """The plan of a padded pass: only how long its rows are; transformers' own masks decide what attends to what."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths


class PlainBody:
    """A causal model with transformers' own attention and forwards, put back where the fast path exchanged them."""

    def __init__(self, model: Any) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self.causal = model, causal
        self.fused = is_fused(causal)
        unfuse_modules(causal)
        self.packed = restore(causal)

    def give_back(self) -> None:
        """Exchange again what was exchanged before: an engine may hold the model."""
        if self.packed:
            install(self.causal)
        if self.fused:
            fuse_modules(self.causal)


def plain_step_loss(
    body: PlainBody,
    rows: Sequence[TrainRow],
    *,
    normalization: str,
    task_weight: float = 1.0,
    micro_tokens: int = 3072,
    backward: bool = True,
    device: torch.device | str = "cpu",
    clip: Callable[[], Tensor] | None = None,
    moved: Callable[[int], None] | None = None,
    total: float | None = None,
) -> StepLoss:
    """Loss of one step's rows as ``step.step_loss`` defines it, gradients accumulated over padded micro-batches.

    Args:
        body: the model.
        rows: the rows of the step.
        normalization: ``example`` or ``token``.
        task_weight: weight of task rows.
        micro_tokens: tokens of one pass, padding included.
        backward, clip, moved: as in ``step.accumulate``.
        total: as in ``step.step_loss``.
    """
    if total is None:
        total = batch_total(rows, normalization, task_weight)
    divisor = send(torch.tensor(total, dtype=torch.float32), device)

    def forward(group: list[TrainRow]) -> Pass:
        width = len(group[0].ids)
        ids = np.zeros((len(group), width), dtype=np.int64)
        seen = np.zeros((len(group), width), dtype=np.int64)
        trained = np.zeros((len(group), width), dtype=bool)
        for r, row in enumerate(group):
            ids[r, : len(row.ids)] = row.ids
            seen[r, : len(row.ids)] = 1
            trained[r, : len(row.ids)] = row.mask
        with use_plan(PaddedRows([len(row.ids) for row in group])):
            out = body.model(
                input_ids=send(torch.from_numpy(ids), device),
                attention_mask=send(torch.from_numpy(seen), device),
                use_cache=False,
            )
        at, position = (send(torch.from_numpy(x), device) for x in np.nonzero(trained))
        targets = send(torch.from_numpy(ids[trained]), device)
        nll = torch.nn.functional.cross_entropy(
            out.logits[at, position - 1].float(), targets, reduction="none"
        )  # the state before a token predicts it
        counts = send(torch.from_numpy(trained.sum(axis=1)), device)
        task = send(torch.tensor([row.task for row in group]), device)
        weight = position_weights(
            counts[at], task[at], normalization=normalization, task_weight=task_weight, total=divisor
        )
        source = np.array([row.source for row in group])
        tokens = sum(len(row.ids) for row in group)
        return Pass((nll * weight).sum(), row_means(nll.detach(), at, counts), source, tokens)

    return accumulate(map(forward, padded_batches(rows, micro_tokens)), backward=backward, clip=clip, moved=moved)
