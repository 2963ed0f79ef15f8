"""Training on a GPU: variable-length flash attention over packed rows.

Each row is one sequence of flash attention; a shared prefix is repeated before each row's own keys and values. Where
flash attention is not available (fp32, a soft cap, an old GPU, no such function in this torch) rows attend in padded
blocks, as on the CPU. Not measured by us: tested by its parts, without a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

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


@lru_cache(maxsize=1)
def _torch_varlen() -> Varlen | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        return None  # before torch 2.11
    flagged = "enable_gqa" in parameters  # from torch 2.12 on; 2.11 takes grouped heads as they are

    def attend(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, left: int) -> Tensor:
        options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if flagged else {}
        out: Any = varlen_attn(query, key, value, *sequences, scale=scale, window_size=(left, 0), **options)
        return out

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


def attention_note(model: PreTrainedModel) -> str | None:
    """The attention a causal model on a GPU trains with, and why not flash attention; None on other devices."""
    weight, config = model.get_output_embeddings().weight, model.config.get_text_config()
    if weight.device.type != "cuda":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    why = _refusal(weight.device, weight.dtype, width)
    if why is None and getattr(config, "attn_logit_softcapping", None):
        why = "the model caps its attention scores"
    if why is None and _own_varlen():
        return "attention: flash attention (torch)"
    if why is None and _package_varlen():
        return "attention: flash attention (flash-attn)"
    why = why or f"torch {torch.__version__} has no variable-length attention with windows, and flash-attn is missing"
    return f"attention: padded blocks ({why})"


class _Repeat(torch.autograd.Function):
    """Keys or values (T, Hk, D) as each row sees them, (Tk, Hk, D): the shared prefix repeated before each row's own.

    The backward pass sums the prefix's gradients over the rows in fp32 and in a fixed order, where indexing would sum
    them in the model's number format in any order.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, index: Tensor, own: Tensor, ahead: Tensor, prefix: int) -> Tensor:
        ctx.indices, ctx.prefix = (own, ahead), prefix
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        own, ahead = ctx.indices
        shared = grad.index_select(0, ahead).view(-1, ctx.prefix, *grad.shape[1:])
        shared = shared.sum(dim=0, dtype=torch.float32).to(grad.dtype)
        return torch.cat([shared, grad.index_select(0, own)]), None, None, None, None


class VarlenPlan(PackedPlan):
    """A packed plan whose rows are sequences of variable-length attention; the shared prefix is the first of them.

    Args:
        lengths, prefix, device: as in ``PackedPlan``.
        find: returns the attention for such queries and values, or None for padded blocks.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        prefix: int = 0,
        device: torch.device | str = "cuda",
        find: Callable[[Tensor, Tensor], Varlen | None] = find_varlen,
    ) -> None:
        super().__init__(lengths, prefix=prefix, device=device)
        self.find = find
        own = np.array(lengths, dtype=np.int64)
        queries = np.concatenate([[prefix], own]) if prefix else own
        keys = np.concatenate([[prefix], own + prefix]) if prefix else own
        ends = (np.concatenate([[0], x.cumsum()]).astype(np.int32) for x in (queries, keys))
        ends_q, ends_k = (send(torch.from_numpy(x), self.device) for x in ends)
        self.sequences = Sequences(ends_q, ends_k, int(queries.max()), int(keys.max()))
        self.key_index: Tensor | None = None  # (Tk,) packed token of each key; None: in order
        if prefix:
            shared = np.arange(prefix)
            starts = prefix + np.concatenate([[0], own.cumsum()])
            pieces = [shared]
            for start, length in zip(starts, own, strict=False):
                pieces += [shared, np.arange(start, start + length)]
            index = np.concatenate(pieces)
            at = np.arange(len(index))
            parts = (index, at[index >= prefix], at[index < prefix])
            self.key_index, self._own, self._ahead = (send(torch.from_numpy(x), self.device) for x in parts)

    def attend(self, layer: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        varlen = self.find(query, value) if rule.softcap is None else None
        if varlen is None:
            return super().attend(layer, query, key, value, rule)
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if self.key_index is not None:
            k, v = (_Repeat.apply(x, self.key_index, self._own, self._ahead, self.prefix) for x in (k, v))
        left = -1 if rule.window is None or rule.window >= self.sequences.longest_k else rule.window - 1
        return varlen(q, k, v, self.sequences, rule.scaling, left)[None]


def packed_plan(lengths: Sequence[int], *, prefix: int = 0, device: torch.device | str = "cpu") -> PackedPlan:
    """The plan for a device: by variable-length attention on a GPU, by padded blocks elsewhere."""
    if torch.device(device).type == "cuda":
        return VarlenPlan(lengths, prefix=prefix, device=device)
    return PackedPlan(lengths, prefix=prefix, device=device)


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
