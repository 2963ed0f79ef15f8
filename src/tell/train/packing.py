"""From the rows of one optimiser step to packed forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tell.rows.prefix import apart, common_prefix, passes, shared_prefix
from tell.train.attention import Plan
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


@dataclass(slots=True, kw_only=True)
class PassTensors:
    """The tensors of one forward pass over packed rows.

    Attributes:
        ids: (T,) int64 tokens, the shared prefix once at the start.
        predictors: (n,) index into T of the state that predicts each trained token.
        targets: (n,) the trained tokens.
        row: (n,) index of the row of each trained token.
        trained: (rows,) trained tokens of each row.
        source: (rows,) source index of each row, on the CPU.
        real: tokens of the rows before sharing.
        prefix: as of ``PackedPlan``.
        soft: distributions to train on instead of ``targets``; None where no row has any.
    """

    ids: Tensor
    predictors: Tensor
    targets: Tensor
    row: Tensor
    trained: Tensor
    source: Tensor
    real: int
    prefix: int = 0
    soft: PackTargets | None = None


@dataclass(slots=True, kw_only=True)
class PackedRows(PassTensors):
    """The rows of one forward pass, packed, on the CPU; ``lengths`` and ``ahead`` are as of ``PackedPlan``."""

    lengths: list[int]
    ahead: list[int]


@dataclass(slots=True, kw_only=True)
class Pack(PassTensors):
    """The same on the model's device, with what attends to what."""

    plan: Plan


def row_weights(rows: Sequence[TrainRow]) -> Tensor | None:
    """(rows,) fp32 weights; None where all are 1, so that nothing is computed with them."""
    weights = [row.weight for row in rows]
    return torch.tensor(weights, dtype=torch.float32) if any(w != 1 for w in weights) else None


def prefix_per_row(device: torch.device | str) -> bool:
    """Whether rows with and without the prefix share a pass; the kernels for CPUs take one prefix for all."""
    return torch.device(device).type == "cuda"


def _cut(rows: Sequence[TrainRow], share_prefix: bool, device: torch.device | str) -> tuple[int, list[int]]:
    """Tokens of the prefix that a pass over ``rows`` computes once, and how many of them each row begins with."""
    if not share_prefix:
        return 0, [0] * len(rows)
    task = [row.task for row in rows]
    return shared_prefix([row.ids for row in rows], task, per_row=prefix_per_row(device))


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
    if share_prefix and len(task) > 1 and other and not prefix_per_row(device):
        prefix, shared = (common_prefix([row.ids for row in part]) for part in (task, rows))
        parts = [task, other] if apart((len(task), len(other)), prefix=prefix, shared=shared) else parts
    groups: list[list[TrainRow]] = []
    for part in parts:
        prefix, ahead = _cut(part, share_prefix, device)
        costs = [len(row.ids) - cut for row, cut in zip(part, ahead, strict=True)]
        # Even passes: as many as needed, none larger than it must be.
        limit = -(-sum(costs) // passes(sum(costs), prefix, micro_tokens))
        group: list[TrainRow] = []
        used = 0
        # Rows with the whole prefix first, so that few passes compute it.
        for i in sorted(range(len(part)), key=lambda i: (-ahead[i], -len(part[i].ids))):
            if group and (prefix + used + costs[i] > micro_tokens or used >= limit):
                groups.append(group)
                group, used = [], 0
            group.append(part[i])
            used += costs[i]
        groups.append(group)
    return groups


def pack_rows(rows: Sequence[TrainRow], *, share_prefix: bool, device: torch.device | str = "cpu") -> PackedRows:
    """Packs rows, their common prefix once where ``share_prefix`` allows it, for a pass on ``device``."""
    prefix, ahead = _cut(rows, share_prefix, device)
    pieces = [rows[ahead.index(prefix)].ids[:prefix]]
    predictors, targets, owner = [], [], []
    at = prefix
    for r, (row, cut) in enumerate(zip(rows, ahead, strict=True)):
        pieces.append(row.ids[cut:])
        trained = np.flatnonzero(row.mask)
        before = trained - 1  # the token whose state predicts
        predictors.append(np.where(before < cut, before, before - cut + at))
        targets.append(row.ids[trained])
        owner.append(np.full(len(trained), r))
        at += len(row.ids) - cut

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return PackedRows(
        lengths=[len(row.ids) - cut for row, cut in zip(rows, ahead, strict=True)],
        prefix=prefix,
        ahead=ahead,
        ids=tensor(pieces),
        predictors=tensor(predictors),
        targets=tensor(targets),
        row=tensor(owner),
        trained=torch.tensor([int(row.mask.sum()) for row in rows]),
        source=torch.tensor([row.source for row in rows]),
        real=sum(len(row.ids) for row in rows),
        soft=pack_targets(rows, "cpu"),
    )


def pack(rows: Sequence[TrainRow], *, share_prefix: bool, device: torch.device | str = "cpu") -> Pack:
    """``pack_rows`` on ``device``, with its plan."""
    host = pack_rows(rows, share_prefix=share_prefix, device=device)
    return Pack(
        plan=packed_plan(host.lengths, prefix=host.prefix, ahead=host.ahead, device=device),
        ids=send(host.ids, device),
        predictors=send(host.predictors, device),
        targets=send(host.targets, device),
        row=send(host.row, device),
        trained=send(host.trained, device),
        source=host.source,
        real=host.real,
        prefix=host.prefix,
        soft=None if host.soft is None else PackTargets(*(send(x, device) for x in host.soft)),
    )


def pack_targets(rows: Sequence[TrainRow], device: torch.device | str) -> PackTargets | None:
    """The distributions of rows whose trained positions follow one another; None where none has any."""
    given = [row.soft for row in rows if row.soft is not None]
    if not given:
        return None
    soft = np.repeat([row.soft is not None for row in rows], [int(row.mask.sum()) for row in rows])
    probs = torch.from_numpy(np.concatenate([targets.probs for targets in given]).astype(np.float32))
    ids = torch.from_numpy(np.concatenate([targets.ids for targets in given]).astype(np.int64))
    if len(ids) != int(soft.sum()):
        raise ValueError(f"{len(ids)} distributions for {int(soft.sum())} trained positions")
    probs /= probs.sum(1, keepdim=True)  # they were rounded
    parts = (*(torch.from_numpy(np.flatnonzero(x)) for x in (soft, ~soft)), ids, probs)
    return PackTargets(*(send(part, device) for part in parts))
