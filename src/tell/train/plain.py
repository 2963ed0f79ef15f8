"""The plain path: padded micro-batches through transformers and peft as they are, with all logits.

The reference for tests and measurements of the fast path, and what ``--fast off`` trains with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tell.train.attention import install, restore, use_plan
from tell.train.device import send
from tell.train.fast.fused import fuse_modules, is_fused, unfuse_modules
from tell.train.packing import TrainRow, pack_targets
from tell.train.soft_loss import soft_cross_entropy
from tell.train.step import Pass, StepLoss, StepRules, accumulate, causal_of, row_means

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def padded_batches(rows: Sequence[TrainRow], micro_tokens: int) -> list[list[TrainRow]]:
    """Rows of a step by descending length, in groups whose padded size stays within ``micro_tokens``."""
    groups: list[list[TrainRow]] = []
    for row in sorted(rows, key=lambda r: -len(r.ids)):
        if groups and len(groups[-1][0].ids) * (len(groups[-1]) + 1) <= micro_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class PaddedRows:
    """The plan of a padded pass: only the lengths of its rows; transformers' own masks decide what attends to what."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths


class PlainBody:
    """A causal model with transformers' own attention and forwards, restored where the fast path replaced them."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model, self.causal = model, causal_of(model)
        self.fused = is_fused(self.causal)
        unfuse_modules(self.causal)
        self.packed = restore(self.causal)

    def give_back(self) -> None:
        """Reinstate the fast path where it was before: an engine may hold the model."""
        if self.packed:
            install(self.causal)
        if self.fused:
            fuse_modules(self.causal)


def plain_step_loss(
    body: PlainBody,
    rows: Sequence[TrainRow],
    rules: StepRules,
    *,
    backward: bool = True,
    clip: Callable[[], Tensor] | None = None,
    moved: Callable[[int], None] | None = None,
    total: float | None = None,
) -> StepLoss:
    """As ``step.step_loss``, with gradients accumulated over padded micro-batches; no prefix is shared."""
    device = body.causal.device
    divisor = torch.tensor(rules.total(rows) if total is None else total, dtype=torch.float32)

    def forward(group: list[TrainRow]) -> Pass:
        shape = len(group), len(group[0].ids)
        ids, seen, trained = (np.zeros(shape, dtype=kind) for kind in (np.int64, np.int64, bool))
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
        logits = out.logits[at, position - 1].float()  # the state before a token predicts it
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        if (soft := pack_targets(group, device)) is not None:
            nll = nll.index_copy(0, soft.at, soft_cross_entropy(logits[soft.at], soft.ids, soft.probs))
        counts = send(torch.from_numpy(trained.sum(axis=1)), device)
        weights = rules.scaled(send(rules.weights(group, divisor), device))
        source = np.array([row.source for row in group])
        tokens = sum(len(row.ids) for row in group)
        return Pass((nll * weights).sum(), row_means(nll.detach(), at, counts), source, tokens)

    groups = padded_batches(rows, rules.micro_tokens)
    return accumulate(map(forward, groups), backward=backward, clip=clip, moved=moved, scale=rules.scale)
