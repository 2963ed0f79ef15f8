"""Attention over packed rows, without padding in the rest of the model.

A custom attention function is registered with transformers under the name ``tell``. transformers builds no mask for an
unknown name, so the plan alone decides what attends to what: run the model under ``use_plan`` on one "batch" of T
tokens with explicit position ids.

Rows of similar length are padded into blocks for the two batched products of attention (the causal mask hides the
padding, which follows each row) and scattered back. Rows with a common prefix (a system prompt, the anchor) may share
one copy of it: its hidden states are the same in every row unless something random (dropout) differs between rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from tell.errors import TellError
from tell.train.block_attention import Block, BlockAttention, Gather, softmax_scores
from tell.train.device import send

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "tell"
GROUP_SLACK = 1.25  # a block may be this many times as large as its real tokens


class Rule(NamedTuple):
    """What a layer specifies: scale of the scores, sliding window in tokens and soft cap, or None."""

    scaling: float
    window: int | None
    softcap: float | None


class Plan(Protocol):
    """How the T tokens of one forward pass attend to each other and to what was cached."""

    def attend(self, layer: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """(1, H, T, D), (1, Hk, T, D), (1, Hk, T, D) to (1, T, H, D)."""
        ...

    def positions(self) -> Tensor:
        """(1, T) position ids."""
        ...


_plan: ContextVar[Any] = ContextVar("plan", default=None)
# Cache by model: the attention that ``install`` replaced.
_replaced: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def current_plan() -> Any:
    """The plan of the current forward pass."""
    return _plan.get()


@contextmanager
def use_plan(plan: object) -> Iterator[None]:
    """Every attention layer inside follows ``plan``."""
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The function transformers calls in each layer.

    Raises:
        TellError: the layer needs something that plans do not compute.
    """
    for option, what in (("s_aux", "attention sinks"), ("position_bias", "a position bias")):
        if options.get(option) is not None:
            raise _unsupported(module, what)
    plan, scaling = _plan.get(), options.get("scaling")
    if plan is None:
        raise RuntimeError("the model uses tell's attention; run it under use_plan(...)")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    rule = Rule(scaling, options.get("sliding_window"), options.get("softcap"))
    return plan.attend(module, query, key, value, rule), None


def install(model: PreTrainedModel) -> None:
    """Let ``model`` attend through plans.

    Raises:
        TellError: its attention cannot be replaced, or some layer mixes tokens by other means than attention.
    """
    from transformers import AttentionInterface
    from transformers.utils import logging

    AttentionInterface.register(NAME, attention_forward)
    config = model.config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise _unsupported(model, f"{min(other)} layers")
    if config._attn_implementation == NAME:
        return
    before = config._attn_implementation
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers only warns where it cannot
    try:
        model.set_attn_implementation(NAME)
    except ValueError as error:
        raise _unsupported(model, "attention of its own") from error
    finally:
        logging.set_verbosity(level)
    if config._attn_implementation != NAME:
        raise _unsupported(model, "attention of its own")
    _replaced[model] = before


def restore(model: PreTrainedModel) -> bool:
    """Undo ``install``; whether there was anything to undo. A copied model gets transformers' default attention."""
    if installed := model.config.get_text_config()._attn_implementation == NAME:
        default = "sdpa" if model._supports_sdpa else "eager"
        model.set_attn_implementation(_replaced.get(model, default))
    return installed


def _unsupported(module: nn.Module, what: str) -> TellError:
    return TellError(
        f"{type(module).__name__} has {what}, which cannot be computed over packed rows",
        where="model",
        remedy="Use a plain transformer: Llama, Qwen2, Qwen3, Gemma, Phi-3, Mistral, SmolLM and their like.",
    )


class PackedPlan:
    """T = prefix + sum(lengths) tokens: one shared prefix, then the rest of each row.

    Args:
        lengths: tokens of each row after its part of the shared prefix, each at least 1.
        prefix: shared tokens, at the start of the packed sequence; 0 for none.
        ahead: how many of them each row begins with; None: all of them. The kernels for CPUs take only None.
        device: of the tokens.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        prefix: int = 0,
        ahead: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lengths, self.prefix, self.device = list(lengths), prefix, torch.device(device)
        self.ahead = [prefix] * len(lengths) if ahead is None else list(ahead)
        self.total = prefix + sum(lengths)
        starts = np.cumsum([prefix, *lengths])
        self._blocks: list[Block] = []
        self._shares: list[int] = []  # how much of the prefix the rows of each block begin with
        for share in sorted(set(self.ahead), reverse=True):
            mine = [r for r, own in enumerate(self.ahead) if own == share]
            for group in _group([lengths[r] for r in mine]):
                rows = [mine[i] for i in group]
                sizes = [lengths[r] for r in rows]
                self._blocks.append(Block(len(rows), max(sizes), torch.from_numpy(starts[rows]), torch.tensor(sizes)))
                self._shares.append(share)
        first = torch.zeros(1, dtype=torch.long)
        self._head = Block(1, prefix, first, torch.tensor([prefix])) if prefix else None
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def packed_blocks(self) -> list[Block]:
        """All blocks; the prefix comes first, as a row of its own."""
        return [*([self._head] if self._head else []), *self._blocks]

    def rows(self) -> tuple[Tensor, Tensor, int]:
        """(rows,) first token and (rows,) tokens of each row after the prefix, longest first; and the prefix."""
        start, length = (torch.cat([getattr(b, name) for b in self._blocks]) for name in ("start", "length"))
        return start, length, self.prefix

    @cached_property
    def indices(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Packed token of each slot of the padded blocks, slot of each token, and the empty slots (None for none)."""
        inverse = torch.zeros(self.total, dtype=torch.long)
        index, holes, slot = [], [], 0
        for block in self.packed_blocks():
            slots = torch.arange(slot, slot + block.rows * block.longest).view(block.rows, block.longest)
            at = torch.arange(block.longest)[None]
            real = at < block.length[:, None]
            tokens = block.start[:, None] + at.minimum(block.length[:, None] - 1)
            inverse[tokens[real]] = slots[real]
            index.append(tokens.flatten())
            holes.append(slots[~real])
            slot += block.rows * block.longest
        empty = torch.cat(holes)
        tokens, slots = send(torch.cat(index), self.device), send(inverse, self.device)
        return tokens, slots, send(empty, self.device) if len(empty) else None

    def positions(self) -> Tensor:
        """(1, T) position ids: each row counts on from its part of the prefix."""
        rows = (torch.arange(share, share + n) for share, n in zip(self.ahead, self.lengths, strict=True))
        return send(torch.cat([torch.arange(self.prefix), *rows])[None], self.device)

    def _hidden(self, length: int, prefix: int, window: int | None) -> Tensor:
        """(length, prefix + length) True where the key is after the query or outside the window."""
        if window is not None and window >= prefix + length:
            window = None
        key = (length, prefix, window)
        if key not in self._masks:
            q = torch.arange(prefix, prefix + length, device=self.device)[:, None]
            k = torch.arange(prefix + length, device=self.device)[None]
            hidden = k > q
            if window is not None:
                hidden |= k <= q - window
            self._masks[key] = hidden
        return self._masks[key]

    def attend(self, layer: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        heads, prefix = query.shape[1], self.prefix
        q, k, v = (self._pad(x) for x in (query * rule.scaling, key, value))
        outputs: list[Tensor] = []
        kp = vp = None
        if prefix:
            kp, vp = (x[:prefix].transpose(0, 1)[None] for x in (k, v))  # (1, Hk, P, D)
            outputs.append(self._block(q[:prefix][None], kp, vp, None, None, rule))
        outputs += self._attend_rows((q[prefix:], k[prefix:], v[prefix:]), kp, vp, rule)
        flat = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        index, inverse, holes = self.indices
        out = Gather.apply(flat, inverse, index, holes)
        return out.view(1, self.total, heads, -1)

    def _attend_rows(
        self, padded: tuple[Tensor, ...], kp: Tensor | None, vp: Tensor | None, rule: Rule
    ) -> Iterator[Tensor]:
        """Outputs of each block of rows; queries, keys and values are ``padded`` (slots, heads, D)."""
        slot = 0
        for block, share in zip(self._blocks, self._shares, strict=True):
            span, shape = slice(slot, slot + block.rows * block.longest), (block.rows, block.longest)
            q, k, v = (x[span].unflatten(0, shape) for x in padded)
            ahead_k, ahead_v = (None if x is None or not share else x[:, :, :share] for x in (kp, vp))
            yield self._block(q, k.transpose(1, 2), v.transpose(1, 2), ahead_k, ahead_v, rule)
            slot = span.stop

    def _pad(self, x: Tensor) -> Tensor:
        """(1, H, T, D) to (slots, H, D)."""
        index, inverse, _ = self.indices
        return Gather.apply(x[0].transpose(0, 1), index, inverse, None)

    def _block(self, q: Tensor, k: Tensor, v: Tensor, kp: Tensor | None, vp: Tensor | None, rule: Rule) -> Tensor:
        """(B, L, H, D) queries over own keys (B, Hk, L, D) and the shared (1, Hk, P, D): (B * L, H, D).

        Key heads are the leading dimension of every product, so that one product serves the shared keys of all rows.
        """
        rows, length, heads, width = q.shape
        kv = k.shape[1]
        group = heads // kv
        q = q.unflatten(2, (kv, group)).permute(2, 0, 3, 1, 4).reshape(kv * rows, group * length, width)
        k = k.transpose(0, 1).reshape(kv * rows, length, width)
        v = v.transpose(0, 1).reshape(kv * rows, length, -1)
        if kp is not None and vp is not None:
            kp, vp = kp[0].contiguous(), vp[0].contiguous()
        prefix = 0 if kp is None else kp.shape[1]
        window = rule.window if rule.window is not None and rule.window < prefix + length else None
        if window is None and rule.softcap is None:
            out = BlockAttention.apply(q, k, v, kp, vp, self._hidden(length, 0, None))
        else:
            out = self._plain(q, k, v, kp, vp, length, rule)
        out = out.view(kv, rows, group, length, -1).permute(1, 3, 0, 2, 4)
        return out.reshape(rows * length, heads, -1)

    def _plain(
        self, q: Tensor, k: Tensor, v: Tensor, kp: Tensor | None, vp: Tensor | None, length: int, rule: Rule
    ) -> Tensor:
        """As ``BlockAttention``, by autograd, for layers with a window or a soft cap."""
        n, m, width = q.shape
        scores = torch.bmm(q, k.transpose(1, 2))
        prefix = 0
        if kp is not None:
            prefix = kp.shape[1]
            ahead = torch.bmm(q.view(len(kp), -1, width), kp.transpose(1, 2))
            scores = torch.cat([ahead.view(n, m, prefix), scores], dim=-1)
        scores = scores.view(n, m // length, length, prefix + length)
        probs = softmax_scores(scores, rule, self._hidden(length, prefix, rule.window)).view(n, m, -1)
        if kp is None or vp is None:
            return torch.bmm(probs, v)
        ahead = torch.bmm(probs[..., :prefix].reshape(len(kp), -1, prefix), vp)
        return ahead.view(n, m, -1) + torch.bmm(probs[..., prefix:], v)


class RulePlan(PackedPlan):
    """One row; records the rule of each attention layer."""

    def __init__(self, length: int, *, device: torch.device | str = "cpu") -> None:
        super().__init__([length], device=device)
        self.rules: dict[nn.Module | None, Rule] = {}

    def attend(self, layer: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        self.rules[layer] = rule
        return super().attend(layer, query, key, value, rule)


def _group(lengths: Sequence[int]) -> list[list[int]]:
    """Groups rows of similar length so that padding stays under GROUP_SLACK; their order does not matter."""
    order = sorted(range(len(lengths)), key=lambda r: (-lengths[r], r))
    groups: list[list[int]] = []
    real = 0
    for r in order:
        if groups:
            longest = lengths[groups[-1][0]]
            if longest * (len(groups[-1]) + 1) <= GROUP_SLACK * (real + lengths[r]):
                groups[-1].append(r)
                real += lengths[r]
                continue
        groups.append([r])
        real = lengths[r]
    return groups
