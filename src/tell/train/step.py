"""Forward passes over packs: the loss of a step, and losses of rows without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tell.errors import TellError
from tell.rows.row_table import RowTable
from tell.train.attention import PackedPlan, install, use_plan
from tell.train.fast.fused import fuse_modules
from tell.train.loss import blocked_cross_entropy, position_weights
from tell.train.packing import Pack, TrainRow, pack, split_packs
from tell.train.transfer import send


@dataclass(slots=True)
class StepLoss:
    """One step's loss and the single losses behind it.

    Attributes:
        loss: the optimised scalar.
        rows: (rows,) mean nll of each row in nats a token.
        source: (rows,) source index of each row.
        tokens: real tokens (shared prefixes counted in every row).
        norm: of the gradient before clipping; None where nothing was clipped.
    """

    loss: float
    rows: np.ndarray
    source: np.ndarray
    tokens: int
    norm: float | None = None


class Pass(NamedTuple):
    """What one forward pass over some of a step's rows gives.

    Attributes:
        loss: scalar, its part of the step's loss, with gradient.
        means: (rows,) mean nll of its rows.
        source: (rows,) their source indices.
        tokens: theirs, as in ``StepLoss``.
    """

    loss: Tensor
    means: Tensor
    source: np.ndarray
    tokens: int


def accumulate(
    passes: Iterable[Pass],
    *,
    backward: bool,
    clip: Callable[[], Tensor] | None,
    moved: Callable[[int], None] | None = None,
) -> StepLoss:
    """The sum of passes, each made when its turn comes and sent backward before the next: one graph at a time.

    What they leave on the device is fetched in one transfer: a GPU is waited for once a step.

    Args:
        passes: at least one.
        backward: accumulate gradients.
        clip: called after the last pass; gives the gradient's norm, a scalar on the device.
        moved: called after each pass with its tokens.
    """
    parts, means, source, tokens = [], [], [], 0
    for done in passes:
        if backward:
            done.loss.backward()
        parts.append(done.loss.detach())
        means.append(done.means)
        source.append(done.source)
        tokens += done.tokens
        if moved:
            moved(done.tokens)
    tail = [] if clip is None else [clip().detach().float().reshape(1)]
    values = torch.cat([torch.stack(parts).float(), *means, *tail]).cpu().numpy()
    rows = values[len(parts) : len(values) - len(tail)]
    loss = sum(values[: len(parts)].tolist())
    return StepLoss(loss, rows, np.concatenate(source), tokens, float(values[-1]) if tail else None)


class Body:
    """The parts of a causal model that a packed pass needs: transformer body, output layer, soft cap.

    Raises:
        TellError: rows of one pass would see each other in this architecture.
    """

    def __init__(self, model: Any) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = causal.config.get_text_config()
        self.core = causal.base_model
        output = causal.get_output_embeddings()
        self.head: Tensor = output.weight
        self.bias: Tensor | None = getattr(output, "bias", None)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = _logit_scale(config)
        install(causal)
        with torch.inference_mode(False):  # what is tried and kept here serves training too
            if not getattr(causal, "_tell_checked", False):
                self._check(model)
                causal._tell_checked = True
            fuse_modules(causal)

    @torch.no_grad()
    def _check(self, model: Any) -> None:
        """Refuse what leaks between rows past the attention function: convolutions, recurrent states, own masks."""
        was_training = model.training
        model.eval()
        plan = PackedPlan([8, 8], device=self.head.device)
        ids = torch.arange(16, device=self.head.device) % len(self.head)
        states = []
        for shift in (0, 16):
            ids[:8] = (ids[:8] + shift) % len(self.head)
            with use_plan(plan):
                out = self.core(input_ids=ids[None], position_ids=plan.positions(), use_cache=False)
            states.append(out.last_hidden_state[0].float())
        model.train(was_training)
        change = (states[0] - states[1]).abs()
        if not change[8:].max() <= 0.02 * states[0].abs().max() or not change[:8].max() > 0:
            raise TellError(
                f"{type(self.core).__name__} mixes the rows of a batch outside its attention",
                where="model",
                remedy="Use a plain transformer: Llama, Qwen2, Qwen3, Gemma, Phi-3, Mistral, SmolLM and their like.",
            )

    def states(self, pack: Pack) -> Tensor:
        """(n, h) states at the predictors of a pack."""
        with use_plan(pack.plan):
            out = self.core(input_ids=pack.ids[None], position_ids=pack.plan.positions(), use_cache=False)
        states = out.last_hidden_state[0].index_select(0, pack.predictors)
        return states * self.logit_scale if self.logit_scale != 1 else states


def _logit_scale(config: Any) -> float:
    """Cohere multiplies its logits, Granite divides them; both are linear, so the state can carry it."""
    if getattr(config, "logit_scale", None):
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return 1.0


def batch_total(rows: Sequence[TrainRow], normalization: str, task_weight: float) -> float:
    """What a step's weighted sum is divided by: weights of its rows (``example``) or of their tokens (``token``)."""
    weights = [task_weight if row.task else 1.0 for row in rows]
    if normalization == "token":
        return sum(w * int(row.mask.sum()) for w, row in zip(weights, rows, strict=True))
    return sum(weights)


def row_means(nll: Tensor, row: Tensor, trained: Tensor) -> Tensor:
    """(rows,) mean nll of each row.

    Args:
        nll: (n,) of each trained token.
        row: (n,) which row it belongs to.
        trained: (rows,) trained tokens of each row.
    """
    sums = torch.zeros(len(trained), dtype=torch.float32, device=nll.device)
    return sums.index_add_(0, row, nll) / trained


def step_loss(
    body: Body,
    rows: Sequence[TrainRow],
    *,
    normalization: str,
    task_weight: float = 1.0,
    micro_tokens: int = 3072,
    share_prefix: bool = False,
    backward: bool = True,
    device: torch.device | str = "cpu",
    clip: Callable[[], Tensor] | None = None,
    moved: Callable[[int], None] | None = None,
    total: float | None = None,
) -> StepLoss:
    """Loss of one step's rows, gradients accumulated over packs.

    Accumulated gradients equal those of one big pass: each position's weight is set from the whole batch.

    Args:
        body: the model's parts.
        rows: the rows of the step.
        normalization: ``example`` or ``token``.
        task_weight: weight of task rows.
        micro_tokens: tokens of one pass.
        share_prefix: compute the prefix that rows share once; only right without dropout and noise.
        backward, clip, moved: as in ``accumulate``.
        total: what the weighted sum is divided by where these rows are not the whole step.
    """
    if total is None:
        total = batch_total(rows, normalization, task_weight)
    divisor = send(torch.tensor(total, dtype=torch.float32), device)

    def forward(group: list[TrainRow]) -> Pass:
        batch = pack(group, share_prefix=share_prefix, device=device)
        weight = position_weights(
            batch.trained[batch.row],
            batch.task[batch.row],
            normalization=normalization,
            task_weight=task_weight,
            total=divisor,
        )
        states = body.states(batch)
        loss, nll = blocked_cross_entropy(states, body.head, batch.targets, weight, body.softcap, body.bias)
        return Pass(loss, row_means(nll, batch.row, batch.trained), batch.source.numpy(), batch.real)

    groups = split_packs(rows, micro_tokens, share_prefix=share_prefix, device=device)
    return accumulate(map(forward, groups), backward=backward, clip=clip, moved=moved)


@torch.no_grad()
def row_losses(
    model: Any,
    table: RowTable,
    indices: Sequence[int] | None = None,
    *,
    micro_tokens: int = 3072,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """(rows,) mean nll in nats a trained token of each row, without training."""
    body = Body(model)
    chosen = list(range(len(table))) if indices is None else list(indices)
    order = sorted(chosen, key=lambda i: (int(table.tokens[i]), i))
    done: list[int] = []
    means: list[Tensor] = []
    group: list[int] = []
    used = 0

    def flush() -> None:
        nonlocal used
        rows = [TrainRow(*table.row(i), 0, False) for i in group]
        batch = pack(rows, share_prefix=True, device=device)
        weight = torch.ones(len(batch.targets), device=device)
        _, nll = blocked_cross_entropy(body.states(batch), body.head, batch.targets, weight, body.softcap, body.bias)
        done.extend(group)
        means.append(row_means(nll, batch.row, batch.trained))
        if progress:
            progress(len(group))
        group.clear()
        used = 0

    was_training = model.training
    model.eval()
    for i in order:
        if group and used + int(table.tokens[i]) > micro_tokens:
            flush()
        group.append(i)
        used += int(table.tokens[i])
    if group:
        flush()
    model.train(was_training)
    at = dict(zip(done, torch.cat(means).tolist() if means else [], strict=True))
    return np.array([at[i] for i in chosen])
