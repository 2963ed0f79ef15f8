"""Training on a GPU: variable-length flash attention over packed rows, and Liger's kernels in the layers.

Each row is one sequence of flash attention; what rows share is repeated before each row's own keys and values.
Where flash attention cannot serve (fp32, a soft cap, an old GPU, no such function in this torch) rows are attended
to in padded blocks, as on the processor. Not measured by us: tested by its parts, without a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tell.kernels.ops import SILU
from tell.train.attention import PackedPlan, Rule
from tell.train.fast.exchange import epsilon, planned_attention, split_qkv
from tell.train.transfer import send

WIDEST = 256  # head width that flash attention takes


class Varlen(Protocol):
    """Causal attention of sequences laid end to end, the last query of each aligned with its last key."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        left: int,
    ) -> Tensor:
        """(Tq, H, D), (Tk, Hk, D), (Tk, Hk, D), ends (n + 1,) int32; ``left``: keys before the query's own, -1: all."""
        ...


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

    def attend(
        query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, *,
        scale: float, left: int,
    ) -> Tensor:  # fmt: skip
        more = {"enable_gqa": query.shape[1] != key.shape[1]} if flagged else {}
        return varlen_attn(
            query, key, value, ends_q, ends_k, max_q, max_k, scale=scale, window_size=(left, 0), **more
        )  # fmt: skip

    return attend


@lru_cache(maxsize=1)
def _package_varlen() -> Varlen | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def attend(
        query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, *,
        scale: float, left: int,
    ) -> Tensor:  # fmt: skip
        return flash_attn_varlen_func(
            query, key, value, ends_q, ends_k, max_q, max_k,
            softmax_scale=scale, causal=True, window_size=(left, 0),
        )  # fmt: skip

    return attend


@lru_cache(maxsize=8)
def _capable(index: int) -> bool:
    """Flash attention needs an Ampere GPU or a later one."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


def find_varlen(query: Tensor, value: Tensor) -> Varlen | None:
    """What attends for heads like these (..., D): torch's own, else the flash-attn package's; None where neither can.

    flash-attn serves where torch was built without flash attention.
    """
    width = query.shape[-1]
    if query.device.type != "cuda" or _refusal(query.device, query.dtype, width) or width != value.shape[-1]:
        return None
    return _own_varlen() or _package_varlen()


def _own_varlen() -> Varlen | None:
    return _torch_varlen() if torch.backends.cuda.is_flash_attention_available() else None


def _refusal(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why flash attention cannot serve heads of ``width``; None where it can."""
    if not _capable(device.index or 0):
        return "the GPU is older than Ampere"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the weights are {str(dtype).removeprefix('torch.')}"
    return f"heads are {width} wide" if width % 8 or width > WIDEST else None


def attention_note(model: Any) -> str | None:
    """Which attention a causal model on a GPU trains with, and why not flash attention; None on other devices."""
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
    """Keys or values (T, Hk, D) as each row sees them, (Tk, Hk, D): the shared prefix again before each row's own.

    The way back sums the prefix's gradients over the rows in fp32 and in a fixed order, where indexing would add
    them up in the model's number format in any order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, own: Tensor, ahead: Tensor, prefix: int) -> Tensor:
        ctx.indices, ctx.prefix = (own, ahead), prefix
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        own, ahead = ctx.indices
        shared = grad.index_select(0, ahead).view(-1, ctx.prefix, *grad.shape[1:])
        shared = shared.sum(dim=0, dtype=torch.float32).to(grad.dtype)
        return torch.cat([shared, grad.index_select(0, own)]), None, None, None, None


class VarlenPlan(PackedPlan):
    """A packed plan whose rows are sequences of variable-length attention; the shared prefix is the first of them.

    Args:
        lengths, prefix, device: as in ``PackedPlan``.
        find: what attends for queries and values of a shape; None: padded blocks.
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
        self.longest = int(queries.max()), int(keys.max())  # queries and keys of one sequence
        self.ends_q, self.ends_k = (
            send(torch.from_numpy(np.concatenate([[0], x.cumsum()]).astype(np.int32)), self.device)
            for x in (queries, keys)
        )
        self.key_index: Tensor | None = None  # (Tk,) packed token of each key; None: as they lie
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

    def attend(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        varlen = self.find(query, value) if rule.softcap is None else None
        if varlen is None:
            return super().attend(layer, query, key, value, rule)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.key_index is not None:
            k, v = (_Repeat.apply(x, self.key_index, self._own, self._ahead, self.prefix) for x in (k, v))
        most_q, most_k = self.longest
        left = -1 if rule.window is None or rule.window >= most_k else rule.window - 1
        return varlen(q, k, v, self.ends_q, self.ends_k, most_q, most_k, scale=rule.scaling, left=left)[None]


def packed_plan(lengths: Sequence[int], *, prefix: int = 0, device: torch.device | str = "cpu") -> PackedPlan:
    """The plan for a device: by variable-length attention on a GPU, by padded blocks elsewhere."""
    if torch.device(device).type == "cuda":
        return VarlenPlan(lengths, prefix=prefix, device=device)
    return PackedPlan(lengths, prefix=prefix, device=device)


class Forwards(NamedTuple):
    """What makes the exchanged forward of a module.

    Attributes:
        norm: of (module, offset), offset 0 or 1 being added to the weight.
        attention: of (module, offset of the norms on queries and keys or None, whether positions turn them).
        mlp: of (module, activation).
    """

    norm: Callable[[Any, float], Callable[..., Any]]
    attention: Callable[[Any, float | None, bool], Callable[..., Any]]
    mlp: Callable[[Any, int], Callable[..., Any]]


@lru_cache(maxsize=1)
def liger_forwards() -> Forwards | None:
    """Forwards over Liger's kernels (Hsu et al. 2024, arXiv 2410.10989); None where liger-kernel is not installed.

    Linear layers keep their own forwards, so LoRA stays what it is.
    """
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None

    def normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        casting = "gemma" if offset else "llama"
        # not in place: the residual stream needs the gradient too
        return LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False)

    def norm(module: Any, offset: float) -> Callable[[Tensor], Tensor]:
        original, eps = module.forward, epsilon(module)

        def forward(x: Tensor) -> Tensor:
            if module.weight.dtype != x.dtype:
                return original(x)
            return normed(x, module.weight, eps, offset)

        return forward

    def attention(module: Any, offset: float | None, turned: bool) -> Callable[..., tuple[Tensor, None]]:
        merged, width = hasattr(module, "qkv_proj"), module.head_dim

        def attend(states: Tensor, rope: tuple[Tensor, Tensor], plan: Any, rule: Rule) -> Tensor:
            if merged:
                parts = split_qkv(module, module.qkv_proj(states))
            else:
                parts = [layer(states) for layer in (module.q_proj, module.k_proj, module.v_proj)]
            q, k, v = (x.unflatten(-1, (-1, width)) for x in parts)
            if offset is not None:
                q, k = (normed(x, n.weight, epsilon(n), offset) for x, n in ((q, module.q_norm), (k, module.k_norm)))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if turned:
                q, k = LigerRopeFunction.apply(q, k, *rope)
            return module.o_proj(plan.attend(module, q, k, v, rule).flatten(2))

        return planned_attention(module, attend, lambda plan, _: hasattr(plan, "attend"))

    def mlp(module: Any, kind: int) -> Callable[[Tensor], Tensor]:
        merged = hasattr(module, "gate_up_proj")
        product = LigerSiLUMulFunction if kind == SILU else LigerGELUMulFunction

        def forward(x: Tensor) -> Tensor:
            g, u = module.gate_up_proj(x).chunk(2, dim=-1) if merged else (module.gate_proj(x), module.up_proj(x))
            return module.down_proj(product.apply(g, u))

        return forward

    return Forwards(norm, attention, mlp)
