"""Losses of rows without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tell.rows.row_table import RowTable
from tell.train.packing import TrainRow, pack
from tell.train.step import Body, row_means

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def length_groups(table: RowTable, indices: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Rows by length, in groups of at most ``micro_tokens``; a longer row gets a group of its own."""
    groups: list[list[int]] = []
    used = 0
    for i in sorted(indices, key=lambda i: (int(table.tokens[i]), i)):
        size = int(table.tokens[i])
        if not groups or used + size > micro_tokens:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += size
    return groups


@torch.no_grad()
def row_losses(
    model: PreTrainedModel,
    table: RowTable,
    indices: Sequence[int] | None = None,
    *,
    micro_tokens: int = 3072,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """(rows,) mean nll in nats per trained token of each row, without training."""
    body = Body(model)
    chosen = list(range(len(table))) if indices is None else list(indices)
    groups = length_groups(table, chosen, micro_tokens)
    means: list[Tensor] = []
    was_training = model.training
    model.eval()
    for group in groups:
        batch = pack([TrainRow(*table.row(i), 0, False) for i in group], share_prefix=True, device=body.device)
        _, nll = body.loss(batch, torch.ones(len(batch.targets), device=body.device))
        means.append(row_means(nll, batch.row, batch.trained))
        if progress:
            progress(len(group))
    model.train(was_training)
    done = [i for group in groups for i in group]
    at = dict(zip(done, torch.cat(means).tolist() if means else [], strict=True))
    return np.array([at[i] for i in chosen])
