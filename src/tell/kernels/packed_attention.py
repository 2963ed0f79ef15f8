"""Attention of training over packed rows: the kernels of ``train_attention*.h`` as functions.

In fp32 on any CPU, in bf16 where there are dot products of pairs.

All tensors are on the CPU; their last dimension is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tell.kernels.library import library

_P, _N = c_void_p, c_int64
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class _Task(Structure):
    """``train_attention_task_bf16`` and ``_fp32``."""

    _fields_ = [
        *((name, _N) for name in ("tokens", "rows", "prefix", "heads", "key_heads", "width", "rotary", "window")),
        *((name, _P) for name in ("start", "length", "q", "k", "v")),
        *((name, _N) for name in ("q_stride", "k_stride", "v_stride")),
        *(("cosine", _P), ("sine", _P), ("scaling", c_float), ("out", _P), ("lse", _P)),
        *((name, _P) for name in ("go", "gq", "gk", "gv")),
        ("g_stride", _N),
    ]


class Functions(NamedTuple):
    """The kernels of one number format, for heads whose width is a multiple of ``lanes``."""

    lanes: int
    forward: Callable[..., None]
    backward: Callable[..., None]


class RowAttention:
    """Attention of one call; ``row_attention`` says where it can be used.

    Args:
        q, k, v: (T, H D), (T, Hk D), (T, Hk D), rows may be strided.
        cosine, sine: (T, rot) of the tokens' positions.
        start, length: (rows,) int64, the longest first.
        prefix: tokens at the head that all rows see.
        heads, kv: H and Hk.
        scaling: of the scores.
        window: keys in sight, the query's own included; None for all.
    """

    def __init__(
        self,
        functions: Functions,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cosine: Tensor,
        sine: Tensor,
        start: Tensor,
        length: Tensor,
        prefix: int,
        heads: int,
        kv: int,
        scaling: float,
        window: int | None,
    ) -> None:
        self._functions = functions
        self._kept = q, k, v, cosine, sine, start, length  # the task borrows their memory
        self._task = _Task(
            len(q), len(start), prefix, heads, kv, q.shape[1] // heads, cosine.shape[1], window or 1 << 40,
            start.data_ptr(), length.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(),
            q.stride(0), k.stride(0), v.stride(0), cosine.data_ptr(), sine.data_ptr(), scaling,
        )  # fmt: skip

    def forward(self) -> tuple[Tensor, Tensor]:
        """(T, H D), and (T, H) fp32: the logarithm of each query's sum of exponentials."""
        q, task = self._kept[0], self._task
        out, lse = q.new_empty(q.shape), torch.empty(len(q), task.heads)
        task.out, task.lse = out.data_ptr(), lse.data_ptr()
        self._functions.forward(byref(task))
        return out, lse

    def backward(self, out: Tensor, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, column blocks of one buffer, from ``grad`` (T, H D), contiguous, of ``out``."""
        q, k, v, *_ = self._kept
        task = self._task
        gradients = q.new_empty(len(q), q.shape[1] + k.shape[1] + v.shape[1])
        gq, gk, gv = gradients.split([q.shape[1], k.shape[1], v.shape[1]], dim=1)
        task.out, task.lse, task.go = out.data_ptr(), lse.data_ptr(), grad.data_ptr()
        task.gq, task.gk, task.gv, task.g_stride = gq.data_ptr(), gk.data_ptr(), gv.data_ptr(), gradients.stride(0)
        self._functions.backward(byref(task))
        return gq, gk, gv


@lru_cache(maxsize=4)
def _functions(dtype: torch.dtype) -> Functions | None:
    shared = library()
    if shared is None or dtype not in _SUFFIX:
        return None
    suffix = _SUFFIX[dtype]
    count = shared[f"train_attention_lanes_{suffix}"]
    count.restype = _N
    lanes = int(count())
    if not lanes:  # compiled without the functions
        return None
    forward, backward = shared[f"train_attention_{suffix}"], shared[f"train_attention_back_{suffix}"]
    for function in (forward, backward):
        function.argtypes, function.restype = (POINTER(_Task),), None
    return Functions(lanes, forward, backward)


def row_attention(dtype: torch.dtype, width: int) -> Functions | None:
    """The kernels for heads of ``width``; None where batched products are to be used."""
    found = _functions(dtype)
    return found if found is not None and width % found.lanes == 0 else None
