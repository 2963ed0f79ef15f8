"""Forward passes over packed rows: the loss of an optimiser step, and losses of rows without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from tell.errors import TellError
from tell.kernels.draws import draw_seed
from tell.train.attention import PackedPlan, Plan, install, use_plan
from tell.train.device import Fetch, send
from tell.train.fast.fused import fuse_modules
from tell.train.loss import blocked_cross_entropy
from tell.train.packing import Pack, TrainRow, pack, row_weights, split_packs
from tell.train.soft_loss import blocked_soft_cross_entropy

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

    from tell.train.graphs import PassGraphs

_separate: WeakSet[nn.Module] = WeakSet()  # cache: models whose packed rows were found not to see each other


@dataclass(frozen=True, slots=True)
class StepRules:
    """How the loss of a step is computed.

    Attributes:
        normalization: ``example`` (mean over each row's tokens, then over rows) or ``token``.
        task_weight: weight of a task row relative to a general row.
        micro_tokens: tokens of one forward and backward pass; the plain path counts padding.
        share_prefix: compute the common prefix of rows once; only right without dropout and noise.
        scale: scalar on the device that the loss is multiplied by, so that no gradient rounds to 0 in fp16; None for 1.
    """

    normalization: Literal["example", "token"] = "example"
    task_weight: float = 1.0
    micro_tokens: int = 3072
    share_prefix: bool = False
    scale: Tensor | None = field(default=None, compare=False)

    def total(self, rows: Sequence[TrainRow]) -> float:
        """The normaliser of a step: the sum of its rows' weights (``example``) or of its tokens' (``token``).

        A row's own weight does not count: rows of low weight make a step smaller, not the other rows heavier.
        """
        weights = [self.task_weight if row.task else 1.0 for row in rows]
        if self.normalization == "token":
            return sum(w * int(row.mask.sum()) for w, row in zip(weights, rows, strict=True))
        return sum(weights)

    def position_weights(self, trained: Tensor, task: Tensor, total: Tensor, weight: Tensor | None = None) -> Tensor:
        """Weight of each trained position, so that the weighted sum is the step's loss.

        Args:
            trained: (n,) number of trained tokens of the position's row.
            task: (n,) bool, whether that row is a task row.
            total: normaliser of the whole step, as ``total`` returns.
            weight: (n,) own weight of that row; None: 1.
        """
        own = torch.where(task, self.task_weight, 1.0)
        own = own if weight is None else own * weight
        return (own / trained if self.normalization == "example" else own) / total

    def weights(self, rows: Sequence[TrainRow], total: Tensor) -> Tensor:
        """(n,) weight of each trained position of ``rows``, on the CPU; ``total`` as for ``position_weights``."""
        trained = torch.tensor([int(row.mask.sum()) for row in rows])
        task = torch.tensor([row.task for row in rows])
        return self.position_weights(trained, task, total, row_weights(rows)).repeat_interleave(trained)

    def scaled(self, weights: Tensor) -> Tensor:
        """Weights of positions on the device, times ``scale``: fp16 would round unscaled slopes to 0."""
        return weights if self.scale is None else weights * self.scale


class StepNumbers(NamedTuple):
    """What a step's device computes for the log.

    Attributes:
        loss: the optimised scalar.
        rows: (rows,) mean nll of each row in nats per token, or cross-entropy to the distributions it is trained on.
        norm: of the gradient before clipping; None where nothing was clipped.
    """

    loss: float
    rows: np.ndarray
    norm: float | None = None


class StepLoss:
    """One step's loss and the losses of its rows.

    Args:
        numbers: of the step, or what waits for them to arrive from a GPU.
        source: (rows,) source index of each row.
        tokens: real tokens (shared prefixes counted in every row).
        bad: fp32 scalar on the device: 1 where the loss or the norm is not finite. Only next to numbers that have
            not arrived.
    """

    def __init__(
        self,
        numbers: StepNumbers | Callable[[], StepNumbers],
        source: np.ndarray,
        tokens: int,
        *,
        bad: Tensor | None = None,
    ) -> None:
        self._numbers, self.source, self.tokens, self.bad = numbers, source, tokens, bad

    def __reduce__(self) -> tuple[Any, ...]:
        return StepLoss, (self.numbers, self.source, self.tokens)

    @property
    def arrived(self) -> bool:
        """Whether the numbers can be read without waiting for the device."""
        return isinstance(self._numbers, StepNumbers)

    @property
    def numbers(self) -> StepNumbers:
        """The step's numbers; the first access may wait."""
        if not isinstance(self._numbers, StepNumbers):
            self._numbers = self._numbers()
        return self._numbers

    @property
    def loss(self) -> float:
        return self.numbers.loss

    @property
    def rows(self) -> np.ndarray:
        return self.numbers.rows

    @property
    def norm(self) -> float | None:
        return self.numbers.norm


class Pass(NamedTuple):
    """The result of one forward pass over some rows of a step.

    Attributes:
        loss: scalar with gradient, its part of the step's loss.
        means: (rows,) mean nll of its rows.
        source: (rows,) their source indices.
        tokens: their real tokens, as in ``StepLoss``.
        finished: its gradients are already accumulated, and ``loss`` has none.
    """

    loss: Tensor
    means: Tensor
    source: np.ndarray
    tokens: int
    finished: bool = False

    def backward(self) -> None:
        """Accumulate its gradients, unless they are."""
        if not self.finished:
            self.loss.backward()


def accumulate(
    passes: Iterable[Pass],
    *,
    backward: bool,
    clip: Callable[[], Tensor] | None,
    moved: Callable[[int], None] | None = None,
    scale: Tensor | None = None,
) -> StepLoss:
    """Sums passes lazily: each runs backward before the next runs forward, so only one graph exists at a time.

    Results are fetched in one transfer, which nobody waits for before they are read.

    Args:
        passes: at least one.
        backward: accumulate gradients.
        clip: called after the last pass; returns the gradient's norm, a scalar on the device.
        moved: called after each pass with its tokens.
        scale: scalar on the device that the passes' losses are multiplied by; the step's is divided by it.
    """
    parts, means, source, tokens = [], [], [], 0
    for done in passes:
        if backward:
            done.backward()
            draw_seed(done.loss.device)  # of the next pass
        parts.append(done.loss.detach())
        means.append(done.means)
        source.append(done.source)
        tokens += done.tokens
        if moved:
            moved(done.tokens)
    losses = torch.stack(parts).float()
    losses = losses if scale is None else losses / scale
    tail = [] if clip is None else [clip().detach().float().reshape(1)]
    values, sources = Fetch(torch.cat([losses, *means, *tail])), np.concatenate(source)

    def numbers() -> StepNumbers:
        found = values.array()
        rows = found[len(parts) : len(found) - len(tail)]
        return StepNumbers(sum(found[: len(parts)].tolist()), rows, float(found[-1]) if tail else None)

    if not values.waits:
        return StepLoss(numbers(), sources, tokens)
    bad = torch.isfinite(torch.cat([losses, *tail])).all().logical_not().float()
    return StepLoss(numbers, sources, tokens, bad=bad)


def causal_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model, whether or not peft wraps it."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return causal


class Body:
    """The parts of a causal model that a packed pass needs: transformer body, output layer, soft cap.

    Attributes:
        causal: the model.
        graphs: that training passes are replayed by, where set.

    Raises:
        TellError: packed rows would see each other in this architecture.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        causal = causal_of(model)
        config = causal.config.get_text_config()
        self.causal, self.core = causal, causal.base_model
        output = causal.get_output_embeddings()
        self.head: Tensor = output.weight
        self.bias: Tensor | None = getattr(output, "bias", None)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = _logit_scale(config)
        self.device = self.head.device
        self.graphs: PassGraphs | None = None
        install(causal)
        with torch.inference_mode(False):  # tensors cached here are used in training too
            if causal not in _separate:
                self._check(model)
                _separate.add(causal)
            fuse_modules(causal)

    @torch.no_grad()
    def _check(self, model: nn.Module) -> None:
        """Refuse leaks between rows outside the attention function: convolutions, recurrent states, own masks."""
        was_training = model.training
        model.eval()
        plan = PackedPlan([8, 8], device=self.device)
        ids = torch.arange(16, device=self.device) % len(self.head)
        states = []
        for shift in (0, 16):
            ids[:8] = (ids[:8] + shift) % len(self.head)
            states.append(self.run(plan, ids).float())
        model.train(was_training)
        change = (states[0] - states[1]).abs()
        if not change[8:].max() <= 0.02 * states[0].abs().max() or not change[:8].max() > 0:
            raise TellError(
                f"{type(self.core).__name__} mixes the rows of a batch outside its attention",
                where="model",
                remedy="Use a plain transformer: Llama, Qwen2, Qwen3, Gemma, Phi-3, Mistral, SmolLM and their like.",
            )

    def run(self, plan: Plan, ids: Tensor) -> Tensor:
        """(T, h) final states of packed tokens (T,)."""
        with use_plan(plan):
            out = self.core(input_ids=ids[None], position_ids=plan.positions(), use_cache=False)
        return out.last_hidden_state[0]

    def states(self, pack: Pack) -> Tensor:
        """(n, h) states at the predictors of a pack."""
        states = self.run(pack.plan, pack.ids).index_select(0, pack.predictors)
        return states * self.logit_scale if self.logit_scale != 1 else states

    def loss(self, pack: Pack, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the pack's losses, weighted by (n,) fp32, and (n,) each of them without gradient.

        They are nll of the trained tokens, or cross-entropies to distributions where the pack has those.
        """
        states, soft, more = self.states(pack), pack.soft, (self.softcap, self.bias)
        if soft is None:
            return blocked_cross_entropy(states, self.head, pack.targets, weights, *more)
        goal = soft.ids, soft.probs
        loss, found = blocked_soft_cross_entropy(states[soft.at], self.head, goal, weights[soft.at], *more)
        if not len(soft.hard):
            return loss, found
        hard = pack.targets[soft.hard], weights[soft.hard]
        own, nll = blocked_cross_entropy(states[soft.hard], self.head, *hard, *more)
        return loss + own, torch.empty_like(weights).index_copy_(0, soft.at, found).index_copy_(0, soft.hard, nll)


def _logit_scale(config: PretrainedConfig) -> float:
    """Cohere multiplies its logits, Granite divides them; both are linear, so they can be applied to the states."""
    if getattr(config, "logit_scale", None):
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return 1.0


def row_means(nll: Tensor, row: Tensor, trained: Tensor) -> Tensor:
    """(rows,) mean nll of each row.

    Args:
        nll: (n,) of each trained token.
        row: (n,) index of its row.
        trained: (rows,) trained tokens of each row.
    """
    sums = torch.zeros(len(trained), dtype=torch.float32, device=nll.device)
    return sums.index_add_(0, row, nll) / trained


def pass_loss(body: Body, batch: Pack, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The part of a pass in a step's loss, with gradient, and (rows,) the mean loss of each of its rows.

    All that differs between passes of one shape is in tensors, and none of them is read on the host: a pass can be
    captured as a CUDA graph.
    """
    loss, nll = body.loss(batch, weights)
    return loss, row_means(nll, batch.row, batch.trained)


def step_loss(
    body: Body,
    rows: Sequence[TrainRow],
    rules: StepRules,
    *,
    backward: bool = True,
    clip: Callable[[], Tensor] | None = None,
    moved: Callable[[int], None] | None = None,
    total: float | None = None,
) -> StepLoss:
    """Loss of one step's rows, gradients accumulated over packed passes.

    Accumulated gradients equal those of one big pass: each position's weight follows from the whole step.

    Args:
        body: the model's parts.
        rows: the rows of the step.
        rules: how the loss is computed.
        backward, clip, moved: as in ``accumulate``.
        total: normaliser (``StepRules.total``) of the whole step where ``rows`` are only some of it.
    """
    device, share, graphs = body.device, rules.share_prefix, body.graphs if backward else None
    divisor = torch.tensor(rules.total(rows) if total is None else total, dtype=torch.float32)

    def forward(group: list[TrainRow]) -> Pass:
        weights = rules.weights(group, divisor)
        if graphs is not None and (done := graphs.run(body, group, weights, share_prefix=share, scale=rules.scale)):
            return done
        batch, weights = pack(group, share_prefix=share, device=device), send(weights, device)
        loss, means = pass_loss(body, batch, rules.scaled(weights))
        return Pass(loss, means, batch.source.numpy(), batch.real)

    groups = split_packs(rows, rules.micro_tokens, share_prefix=share, device=device)
    return accumulate(map(forward, groups), backward=backward, clip=clip, moved=moved, scale=rules.scale)
