"""Training on a GPU: variable-length flash attention over packed rows.

Each row is one sequence of flash attention; a shared prefix is repeated before the own keys and values of each row that
has it. Where flash attention is not available (fp32, a soft cap, an old GPU, a torch built without it) rows attend in
padded blocks, as on the CPU. Not measured by us: tested by its parts, without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from tell.train.attention import PackedPlan, Rule
from tell.train.device import send
from tell.train.torch_types import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDEST = 256  # head width that flash attention takes


class Sequences(NamedTuple):
    """Packed sequences of queries and of keys; the last query of each is aligned with its last key.

    Attributes:
        ends_q, ends_k: (n + 1,) int32, cumulative lengths from 0.
        longest_q, longest_k: tokens of the longest.
    """

    ends_q: Tensor
    ends_k: Tensor
    longest_q: int
    longest_k: int


# Causal attention of (query (Tq, H, D), key (Tk, Hk, D), value (Tk, Hk, D), sequences, scale, left); ``left``: keys in
# sight before the query's own, -1 for all.
Varlen = Callable[[Tensor, Tensor, Tensor, Sequences, float, int], Tensor]


class _Flash(torch.autograd.Function):
    """``Varlen`` by torch's own flash attention, for torch 2.6 and later.

    ``torch.nn.attention.varlen`` wraps the same two operations from torch 2.10 on, lacks windows before 2.11, and is a
    custom operation, whose Python costs more than the launch.
    """

    @staticmethod
    def forward(
        ctx: Context, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, left: int
    ) -> Tensor:
        ctx.rule = (sequences.longest_q, sequences.longest_k, 0.0, left < 0)  # dropout 0; causal, where all is in sight
        ctx.options = {"scale": scale, "window_size_left": left, "window_size_right": 0}
        ends = sequences.ends_q, sequences.ends_k
        forward = torch.ops.aten._flash_attention_forward.default
        out, lse, seed, offset, _ = forward(query, key, value, *ends, *ctx.rule, False, **ctx.options)
        ctx.save_for_backward(query, key, value, out, lse, *ends, seed, offset)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seed, offset = ctx.saved_tensors
        backward = torch.ops.aten._flash_attention_backward.default
        return *backward(grad, *tensors, *ctx.rule, seed, offset, **ctx.options), None, None, None


@lru_cache(maxsize=1)
def _torch_varlen() -> Varlen | None:
    """torch's flash attention; None where its operations do not take our arguments."""
    wanted = {"scale", "window_size_left", "window_size_right"}
    for name, positional in (("_flash_attention_forward", 10), ("_flash_attention_backward", 14)):
        operation = getattr(torch.ops.aten, name, None)
        if operation is None or "default" not in operation.overloads():
            return None
        arguments = operation.default._schema.arguments
        options = {argument.name for argument in arguments if argument.kwarg_only}
        if not wanted <= options or len(arguments) - len(options) != positional:
            return None
    attend: Varlen = _Flash.apply
    return attend


@lru_cache(maxsize=1)
def _package_varlen() -> Varlen | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, left: int) -> Tensor:
        options = {"softmax_scale": scale, "causal": True, "window_size": (left, 0)}
        return flash_attn_varlen_func(query, key, value, *sequences, **options)

    return attend


@lru_cache(maxsize=8)
def _capable(index: int) -> bool:
    """Flash attention needs an Ampere GPU or a later one."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


def find_varlen(query: Tensor, value: Tensor) -> Varlen | None:
    """Flash attention for heads like these (..., D): torch's, else that of the package flash-attn, else None."""
    width = query.shape[-1]
    if query.device.type != "cuda" or _refusal(query.device, query.dtype, width) or width != value.shape[-1]:
        return None
    return _own_varlen() or _package_varlen()


def _own_varlen() -> Varlen | None:
    return _torch_varlen() if torch.backends.cuda.is_flash_attention_available() else None


def _refusal(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why flash attention cannot compute heads of ``width``; None where it can."""
    if not _capable(device.index or 0):
        return "the GPU is older than Ampere"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the weights are {str(dtype).removeprefix('torch.')}"
    return f"heads are {width} wide" if width % 8 or width > WIDEST else None


def flash_refusal(model: PreTrainedModel) -> str | None:
    """Why a causal model on a GPU does not train with flash attention; None where it does."""
    weight, config = model.get_output_embeddings().weight, model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if why := _refusal(weight.device, weight.dtype, width):
        return why
    if getattr(config, "attn_logit_softcapping", None):
        return "the model caps its attention scores"
    if _own_varlen() or _package_varlen():
        return None
    return f"torch {torch.__version__} has no flash attention, and flash-attn is missing"


def attention_note(model: PreTrainedModel) -> str | None:
    """The attention a causal model on a GPU trains with, and why not flash attention; None on other devices."""
    if model.get_output_embeddings().weight.device.type != "cuda":
        return None
    if why := flash_refusal(model):
        return f"attention: padded blocks ({why})"
    return f"attention: flash attention ({'torch' if _own_varlen() else 'flash-attn'})"


class Copies(NamedTuple):
    """Keys and values as the sequences see them: a copy of the prefix's, or of its beginning, before each row's own.

    Attributes:
        token: (Tk,) int64 packed token of each key.
        keys: (Tk,) int64 the same sorted by token: all copies of the first token, of the second, ...
        starts: (T or more,) int64 where each token's copies begin in ``keys``; what comes after T is no token's.
    """

    token: Tensor
    keys: Tensor
    starts: Tensor


class _Repeat(torch.autograd.Function):
    """Keys or values (T, Hk, D) as each row sees them, (Tk, Hk, D).

    The backward pass sums the gradients of a token's copies in fp32 and in a fixed order, where indexing would sum
    them in the model's number format in any order.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, copies: Copies) -> Tensor:
        ctx.copies, ctx.tokens = copies, len(x)
        return x.index_select(0, copies.token)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        copies: Copies = ctx.copies
        sums = embedding_bag(copies.keys, grad.flatten(1), copies.starts, mode="sum")
        return sums[: ctx.tokens].view(-1, *grad.shape[1:]), None


class Layout(NamedTuple):
    """The index tensors of packed rows as sequences, all on one device.

    Attributes:
        positions: (T,) int64 position ids.
        sequences: the prefix, where there is one, then the rows.
        copies: None where no row shares anything: keys are the tokens in order.
    """

    positions: Tensor
    sequences: Sequences
    copies: Copies | None

    @classmethod
    def of(cls, lengths: Sequence[int], prefix: int, ahead: Sequence[int]) -> Layout:
        """On the CPU; arguments as of ``PackedPlan``."""
        own, shares = (np.array([first, *rest], dtype=np.int64) for first, rest in ((prefix, lengths), (0, ahead)))
        ends = np.cumsum(own)
        spans = [np.arange(share, share + n) for share, n in zip(shares, own, strict=True)]
        parts = slice(0 if prefix else 1, None)  # no sequence for an empty prefix
        ends_q, ends_k = (_cumulative(x[parts]) for x in (own, own + shares))
        longest = int(own.max()), int((own + shares).max())
        copies = None
        if prefix:
            pieces = [(np.arange(s), np.arange(end - n, end)) for s, n, end in zip(shares, own, ends, strict=True)]
            copies = copies_of(np.concatenate([part for pair in pieces for part in pair]), int(ends[-1]))
        else:
            ends_k = ends_q
        return cls(torch.from_numpy(np.concatenate(spans)), Sequences(ends_q, ends_k, *longest), copies)

    def on(self, device: torch.device | str) -> Layout:
        """Copied to ``device``."""
        ends_q, ends_k, *longest = self.sequences
        there = send(ends_q, device)
        ends_k = there if ends_k is ends_q else send(ends_k, device)
        copies = None if self.copies is None else Copies(*(send(x, device) for x in self.copies))
        return Layout(send(self.positions, device), Sequences(there, ends_k, *longest), copies)

    def attend(self, varlen: Varlen, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """As ``Plan.attend``, by ``varlen``."""
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if self.copies is not None:
            k, v = (_Repeat.apply(x, self.copies) for x in (k, v))
        left = -1 if rule.window is None or rule.window >= self.sequences.longest_k else rule.window - 1
        return varlen(q, k, v, self.sequences, rule.scaling, left)[None]


def _cumulative(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))


def copies_of(token: np.ndarray, tokens: int) -> Copies:
    """The copies of ``tokens`` tokens from the (Tk,) token of each key."""
    ends = np.bincount(token, minlength=tokens).cumsum()
    starts = np.concatenate([[0], ends[:-1]])
    return Copies(*(torch.from_numpy(x) for x in (token, np.argsort(token, kind="stable"), starts)))


class VarlenPlan(PackedPlan):
    """A packed plan whose rows are sequences of variable-length attention; the shared prefix is the first of them.

    Args:
        lengths, prefix, ahead, device: as in ``PackedPlan``.
        find: returns the attention for such queries and values, or None for padded blocks.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        prefix: int = 0,
        ahead: Sequence[int] | None = None,
        device: torch.device | str = "cuda",
        find: Callable[[Tensor, Tensor], Varlen | None] = find_varlen,
    ) -> None:
        super().__init__(lengths, prefix=prefix, ahead=ahead, device=device)
        self.find = find
        self.layout = Layout.of(self.lengths, prefix, self.ahead).on(self.device)

    def positions(self) -> Tensor:
        return self.layout.positions[None]

    def attend(self, layer: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        varlen = self.find(query, value) if rule.softcap is None else None
        if varlen is None:
            return super().attend(layer, query, key, value, rule)
        return self.layout.attend(varlen, query, key, value, rule)


def packed_plan(
    lengths: Sequence[int],
    *,
    prefix: int = 0,
    ahead: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> PackedPlan:
    """The plan for a device: by variable-length attention on a GPU, by padded blocks elsewhere."""
    if torch.device(device).type == "cuda":
        return VarlenPlan(lengths, prefix=prefix, ahead=ahead, device=device)
    return PackedPlan(lengths, prefix=prefix, ahead=ahead, device=device)


Forward = Callable[..., Any]


class Forwards(NamedTuple):
    """Factories of replacement forwards.

    Attributes:
        norm: from (module, offset); offset 0 or 1 is added to the weight.
        attention: from (module, its rule, offset of the norms on queries and keys or None, whether RoPE applies).
        mlp: from (module, activation).
    """

    norm: Callable[[Any, float], Forward]
    attention: Callable[[Any, Rule, float | None, bool], Forward]
    mlp: Callable[[Any, int], Forward]
