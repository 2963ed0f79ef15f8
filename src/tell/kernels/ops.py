"""The training kernels as functions of tensors: what each back end computes, and the one in C for a CPU.

Each kernel writes into tensors given to it. Their last dimension is contiguous, rows may be strided.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL, c_float, c_int, c_int64, c_uint32, c_void_p
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from tell.kernels.library import library

SILU, GELU_TANH = 0, 1
_P, _N, _F = c_void_p, c_int64, c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "rmsnorm": (_P, _N, _P, _N, _P, _P, _N, _N, _N, _F, _F),
    "rmsnorm_back": (_P, _N, _P, _N, _P, _P, _P, _N, _N, _N, _N, _F),
    "gated": (_P, _P, _N, _P, _N, _N, c_int),
    "gated_back": (_P, _P, _P, _N, _P, _P, _N, _N, _N, c_int),
    "pack": (_P, _N, _P, _P, _N, _P, _P, _P, _N, _N, _N, _N, _N, _N, _F),
    "unpack": (_P, _N, _N, _N, _N, _N, _N, _P, _P, _N, _P, _N, _P, _P, _F),
    "gather_prefix": (_P, _N, _N, _N, _N, _N, _P),
    "add_prefix": (_P, _N, _N, _N, _N, _P),
    "softmax": (_P, _N, _N, _N, _N, _N),
    "softmax_back": (_P, _P, _N, _N, _N, _N),
    "cross_entropy": (_P, _P, _P, _P, _N, _N),
    "dropout": (_P, _P, _N, c_uint32, c_uint32, _F, c_int),
}
Rope = tuple[Tensor, Tensor] | None  # cos and sin, (T, rot) each
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def threshold_of(p: float) -> int:
    """Random words of 32 bits below it are dropped at rate p."""
    return min(round(p * 2**32), 2**32 - 1)


def _pointers(rope: Rope) -> tuple[int, int, int]:
    return (0, 0, 0) if rope is None else (rope[0].data_ptr(), rope[1].data_ptr(), rope[0].shape[-1])


class Kernels(Protocol):
    """What both back ends compute, on tensors of one device and number format."""

    @property
    def caps_logits(self) -> bool:
        """Whether ``cross_entropy`` takes a ``softcap``."""
        ...

    def rmsnorm(
        self, x: Tensor, y: Tensor, weight: Tensor, rstd: Tensor, *, heads: int = 1, eps: float, offset: float
    ) -> None:
        """y = x / rms(x) * (offset + weight) for x, y (T, heads * width); rstd (T, heads) fp32 is for the gradient."""
        ...

    def rmsnorm_back(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor, *, heads: int = 1, offset: float
    ) -> None:
        """dx (T, heads * width) of ``rmsnorm``; the weight is frozen."""
        ...

    def gated(self, g: Tensor, u: Tensor, h: Tensor, kind: int) -> None:
        """h = act(g) u, all (T, width); g and u equally strided, h contiguous."""
        ...

    def gated_back(self, dh: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor, kind: int) -> None:
        """Gradients of ``gated``; dg and du equally strided, dh contiguous; dh becomes act(g) u."""
        ...

    def cross_entropy(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None, nll: Tensor, softcap: float | None = None
    ) -> None:
        """nll (n,) fp32 of targets (n,) int64; logits (n, V) become their gradients where weights (n,) fp32 are given.

        The gradient of sum_i weight_i nll_i: weight (softmax - onehot), where there is no soft cap.
        """
        ...

    def dropout(self, x: Tensor, y: Tensor, p: float, seed: int, *, add: bool = False) -> None:
        """y = (or +=) x, elements dropped at rate p, the rest scaled by 1 / (1 - p); contiguous; a seed is a mask.

        The rate is a multiple of 2^-32: as exact as a uniform fp32 draw.
        """
        ...


class CKernels:
    """``Kernels`` in C for one number format, bf16 or fp32, and attention's parts for batched products."""

    caps_logits = False

    def __init__(self, shared: CDLL, suffix: str) -> None:
        self._c = SimpleNamespace()
        for name, signature in _SIGNATURES.items():
            function = getattr(shared, f"{name}_{suffix}")
            function.argtypes, function.restype = signature, None
            setattr(self._c, name, function)

    def rmsnorm(
        self, x: Tensor, y: Tensor, weight: Tensor, rstd: Tensor, *, heads: int = 1, eps: float, offset: float
    ) -> None:
        self._c.rmsnorm(
            x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), weight.data_ptr(), rstd.data_ptr(),
            x.shape[0], heads, weight.shape[0], eps, offset,
        )  # fmt: skip

    def rmsnorm_back(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor, *, heads: int = 1, offset: float
    ) -> None:
        self._c.rmsnorm_back(
            dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), weight.data_ptr(), rstd.data_ptr(),
            dx.data_ptr(), dx.stride(0), x.shape[0], heads, weight.shape[0], offset,
        )  # fmt: skip

    def gated(self, g: Tensor, u: Tensor, h: Tensor, kind: int) -> None:
        self._c.gated(g.data_ptr(), u.data_ptr(), g.stride(0), h.data_ptr(), g.shape[0], g.shape[1], kind)

    def gated_back(self, dh: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor, kind: int) -> None:
        self._c.gated_back(
            dh.data_ptr(), g.data_ptr(), u.data_ptr(), g.stride(0), dg.data_ptr(), du.data_ptr(),
            dg.stride(0), g.shape[0], g.shape[1], kind,
        )  # fmt: skip

    def pack(
        self, x: Tensor, rope: Rope, out: Tensor, block: Any, heads: int, group: int = 1, prefix: int = 0, scale=1.0
    ) -> None:
        """Rows of a block from x (T, heads * D), each after the tokens 0 .. prefix, rotated (RoPE) and scaled.

        out: (heads / group, rows, group, L, D), L at least prefix + the longest row; zeros fill it up.
        """
        self._c.pack(
            x.data_ptr(), x.stride(0), *_pointers(rope), out.data_ptr(),
            block.start.data_ptr(), block.length.data_ptr(), block.rows,
            out.shape[-2] // group, prefix, heads, group, out.shape[-1], scale,
        )  # fmt: skip

    def unpack(
        self, x: Tensor, rope: Rope, out: Tensor, block: Any, heads: int, group: int = 1, prefix: int = 0, scale=1.0
    ) -> None:
        """The rows' own tokens back from x (heads / group, rows, group, L, D) to out (T, heads * D), rotated back."""
        self._c.unpack(
            x.data_ptr(), block.rows, x.shape[-2] // group, prefix, heads, group, x.shape[-1], *_pointers(rope),
            out.data_ptr(), out.stride(0), block.start.data_ptr(), block.length.data_ptr(), scale,
        )  # fmt: skip

    def gather_prefix(self, x: Tensor, rows: int, total: Tensor) -> None:
        """total (heads, P, D) fp32 += the first P positions of x (heads * rows, L, D), summed over the rows."""
        heads, prefix, width = total.shape
        self._c.gather_prefix(x.data_ptr(), rows, x.shape[1], prefix, heads, width, total.data_ptr())

    def add_prefix(self, x: Tensor, total: Tensor) -> None:
        """x (heads, L, D) += total (heads, P, D) fp32 at its first P positions."""
        heads, prefix, width = total.shape
        self._c.add_prefix(x.data_ptr(), x.shape[1], prefix, heads, width, total.data_ptr())

    def softmax(self, scores: Tensor, longest: int, prefix: int, window: int | None) -> None:
        """Softmax in place of scores (N, M, K), K a multiple of 16; query m is at prefix + m % longest."""
        keys = scores.shape[-1]
        self._c.softmax(
            scores.data_ptr(), scores.numel() // keys, longest, keys, prefix, window if window is not None else 1 << 30
        )  # fmt: skip

    def softmax_back(self, probs: Tensor, grads: Tensor, longest: int, prefix: int) -> None:
        """Gradients of the scores, in place of those of the probabilities."""
        keys = probs.shape[-1]
        self._c.softmax_back(probs.data_ptr(), grads.data_ptr(), probs.numel() // keys, longest, keys, prefix)

    def cross_entropy(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None, nll: Tensor, softcap: float | None = None
    ) -> None:
        if softcap is not None:
            raise ValueError("no soft cap")
        self._c.cross_entropy(
            logits.data_ptr(), targets.data_ptr(), 0 if weights is None else weights.data_ptr(), nll.data_ptr(),
            logits.shape[0], logits.shape[1],
        )  # fmt: skip

    def dropout(self, x: Tensor, y: Tensor, p: float, seed: int, *, add: bool = False) -> None:
        self._c.dropout(x.data_ptr(), y.data_ptr(), x.numel(), seed, threshold_of(p), 1 / (1 - p), int(add))


@lru_cache(maxsize=4)
def _kernels(dtype: torch.dtype) -> CKernels | None:
    shared = library()
    return None if shared is None or dtype not in _SUFFIX else CKernels(shared, _SUFFIX[dtype])


def _on_gpu(x: Tensor) -> Kernels | None:
    from tell.kernels.triton_trial import gpu_kernels  # Triton is loaded where there is a GPU

    return gpu_kernels(x.device).kernels if x.dtype in GPU_DTYPES else None


GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACK_ENDS: dict[str, Callable[[Tensor], Kernels | None]] = {"cpu": lambda x: _kernels(x.dtype), "cuda": _on_gpu}


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels for tensors like ``x``; None where there are none (another device or format, no compiler)."""
    find = BACK_ENDS.get(x.device.type)
    return None if find is None else find(x)


def why_none(x: Tensor) -> str | None:
    """Why a GPU has no kernels for tensors like ``x``; None where it has, and on other devices."""
    if x.device.type != "cuda" or kernels_for(x) is not None:
        return None
    from tell.kernels.triton_trial import gpu_kernels

    return gpu_kernels(x.device).why or f"no kernels for {str(x.dtype).removeprefix('torch.')}"
