"""From the rows of one optimiser step to packed forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tell.rows.prefix import MIN_PREFIX, apart, common_prefix, passes
from tell.train.attention import PackedPlan
from tell.train.device import send
from tell.train.fast.cuda import packed_plan


class RowTargets(NamedTuple):
    """Distributions that a row is trained on instead of its m trained tokens.

    Attributes:
        ids: (m, k) tokens.
        probs: (m, k + 1) their probabilities, the last of all other tokens together.
    """

    ids: np.ndarray
    probs: np.ndarray


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One row of a step.

    Attributes:
        ids: (n,) tokens.
        mask: (n,) bool, which are trained.
        source: index of its source.
        task: it is a row of the task, with the anchor.
        soft: distributions to train on; None: the tokens themselves.
        weight: by which its loss is multiplied.
    """

    ids: np.ndarray
    mask: np.ndarray
    source: int
    task: bool
    soft: RowTargets | None = None
    weight: float = 1.0


class PackTargets(NamedTuple):
    """The distributions among the n targets of a pass, m positions.

    Attributes:
        at: (m,) their indices among the n.
        hard: (n - m,) indices of the others, which are trained on tokens.
        ids: (m, k) int64 tokens.
        probs: (m, k + 1) fp32 probabilities that sum to one.
    """

    at: Tensor
    hard: Tensor
    ids: Tensor
    probs: Tensor


@dataclass(slots=True)
class Pack:
    """The rows of one forward pass, packed.

    Attributes:
        ids: (T,) int64 tokens, the shared prefix once at the start.
        plan: what attends to what.
        predictors: (n,) index into T of the state that predicts each trained token.
        targets: (n,) the trained tokens.
        row: (n,) index of the row of each trained token.
        trained, task: (rows,) trained tokens and task flag of each row.
        source: (rows,) source index of each row, on the CPU.
        real: tokens of the rows before sharing.
        soft: distributions to train on instead of ``targets``; None where no row has any.
        weight: (rows,) fp32 weight of each row; None: 1 for all.
    """

    ids: Tensor
    plan: PackedPlan
    predictors: Tensor
    targets: Tensor
    row: Tensor
    trained: Tensor
    source: Tensor
    task: Tensor
    real: int
    soft: PackTargets | None = None
    weight: Tensor | None = None


def row_weights(rows: Sequence[TrainRow], device: torch.device | str = "cpu") -> Tensor | None:
    """(rows,) fp32 weights; None where all are 1, so that nothing is computed with them."""
    weights = [row.weight for row in rows]
    return send(torch.tensor(weights, dtype=torch.float32), device) if any(w != 1 for w in weights) else None


def _shared(rows: Sequence[TrainRow], share_prefix: bool) -> int:
    """Tokens of the prefix that a pass over ``rows`` computes once."""
    prefix = common_prefix([row.ids for row in rows]) if share_prefix and len(rows) > 1 else 0
    return prefix if prefix >= MIN_PREFIX else 0


def split_packs(
    rows: Sequence[TrainRow], micro_tokens: int, *, share_prefix: bool, device: torch.device | str = "cpu"
) -> list[list[TrainRow]]:
    """Rows of a step in groups of at most ``micro_tokens`` (a longer row gets a group of its own).

    Each row is in exactly one group. Task rows, which share the anchor, stay together where that saves computing it
    again. The order within a step does not change its gradient.
    """
    task = [row for row in rows if row.task]
    other = [row for row in rows if not row.task]
    parts = [list(rows)]
    if share_prefix and len(task) > 1 and other:
        prefix, shared = (common_prefix([row.ids for row in part]) for part in (task, rows))
        own, others = (sum(len(row.ids) for row in part) for part in (task, other))
        sizes, kind = {"prefix": prefix, "shared": shared, "micro_tokens": micro_tokens}, torch.device(device).type
        parts = [task, other] if apart((len(task), len(other)), (own, others), **sizes, device=kind) else parts
    groups: list[list[TrainRow]] = []
    for part in parts:
        prefix = _shared(part, share_prefix)
        total = sum(len(row.ids) - prefix for row in part)
        # Even passes: as many as needed, none larger than it must be.
        limit = -(-total // passes(total, prefix, micro_tokens))
        group: list[TrainRow] = []
        used = 0
        for row in sorted(part, key=lambda r: -len(r.ids)):
            cost = len(row.ids) - prefix
            if group and (prefix + used + cost > micro_tokens or used >= limit):
                groups.append(group)
                group, used = [], 0
            group.append(row)
            used += cost
        groups.append(group)
    return groups


def pack(rows: Sequence[TrainRow], *, share_prefix: bool, device: torch.device | str = "cpu") -> Pack:
    """Packs rows, their common prefix once where ``share_prefix`` allows it."""
    prefix = _shared(rows, share_prefix)
    pieces = [rows[0].ids[:prefix]] if prefix else []
    predictors, targets, owner = [], [], []
    at = prefix
    for r, row in enumerate(rows):
        pieces.append(row.ids[prefix:])
        trained = np.flatnonzero(row.mask)
        before = trained - 1  # the token whose state predicts
        predictors.append(np.where(before < prefix, before, before - prefix + at))
        targets.append(row.ids[trained])
        owner.append(np.full(len(trained), r))
        at += len(row.ids) - prefix

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return send(torch.from_numpy(np.concatenate(parts).astype(np.int64)), device)

    return Pack(
        ids=tensor(pieces),
        plan=packed_plan([len(row.ids) - prefix for row in rows], prefix=prefix, device=device),
        predictors=tensor(predictors),
        targets=tensor(targets),
        row=tensor(owner),
        trained=send(torch.tensor([int(row.mask.sum()) for row in rows]), device),
        source=torch.tensor([row.source for row in rows]),
        task=send(torch.tensor([row.task for row in rows]), device),
        real=sum(len(row.ids) for row in rows),
        soft=pack_targets(rows, device),
        weight=row_weights(rows, device),
    )


def pack_targets(rows: Sequence[TrainRow], device: torch.device | str) -> PackTargets | None:
    """The distributions of rows whose trained positions follow one another; None where none has any."""
    given = [row.soft for row in rows if row.soft is not None]
    if not given:
        return None
    counts = [int(row.mask.sum()) for row in rows]
    soft = torch.repeat_interleave(torch.tensor([row.soft is not None for row in rows]), torch.tensor(counts))
    probs = torch.from_numpy(np.concatenate([targets.probs for targets in given]).astype(np.float32))
    ids = torch.from_numpy(np.concatenate([targets.ids for targets in given]).astype(np.int64))
    if len(ids) != int(soft.sum()):
        raise ValueError(f"{len(ids)} distributions for {int(soft.sum())} trained positions")
    probs /= probs.sum(1, keepdim=True)  # they were rounded
    parts = (soft.nonzero()[:, 0], (~soft).nonzero()[:, 0], ids, probs)
    return PackTargets(*(send(part, device) for part in parts))
