"""The training kernels on a GPU: launches of ``triton_kernels``.

Tensors are in bf16, fp16 or fp32; their last dimension is contiguous, rows may be strided.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tell.kernels.draws import device_seed
from tell.kernels.ops import threshold_of

WIDEST_NORM = 1 << 16  # elements in one program
_TILE = 2048  # elements of a program over heads


class HeadLayout(NamedTuple):
    """What happens to the heads of queries and keys between their projection and attention.

    Attributes:
        queries, keys: H and Hk; there are as many values as keys.
        width: D.
        cosine, sine: (T, rot) of the tokens' positions, contiguous; None where they are not rotated.
        query_norm, key_norm: (D,) weights of their RMS norms, or both None.
        query_eps, key_eps, offset: of the norms.
    """

    queries: int
    keys: int
    width: int
    cosine: Tensor | None = None
    sine: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    query_eps: float = 0.0
    key_eps: float = 0.0
    offset: float = 0.0

    @property
    def columns(self) -> int:
        """Of the joined queries, keys and values."""
        return (self.queries + 2 * self.keys) * self.width


def _power(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


class TritonKernels:
    """``Kernels`` by Triton, and what only attention on a GPU needs.

    Args:
        code: the module ``triton_kernels``.
    """

    caps_logits = True

    def __init__(self, code: ModuleType) -> None:
        self.code = code

    def launch(self, kernel: Any, grid: tuple[int, ...], first: Tensor, *rest: object, **options: object) -> None:
        """Run ``kernel`` over a grid of programs on the device of its first tensor."""
        if all(grid):
            with torch.cuda.device_of(first):  # Triton launches on the current device
                kernel[grid](first, *rest, **options)

    def rmsnorm(
        self, x: Tensor, y: Tensor, weight: Tensor, rstd: Tensor, *, heads: int = 1, eps: float, offset: float
    ) -> None:
        width, rows = weight.shape[0], x.shape[0] * heads
        each, block = _norm_tile(width)
        self.launch(
            self.code.rmsnorm, (-(-rows // each),), x, y, weight, rstd, x.stride(0), y.stride(0), rows, eps, offset,
            HEADS=heads, WIDTH=width, ROWS=each, BLOCK=block, num_warps=_warps(each * block),
        )  # fmt: skip

    def rmsnorm_back(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor, *, heads: int = 1, offset: float
    ) -> None:
        width, rows = weight.shape[0], x.shape[0] * heads
        each, block = _norm_tile(width)
        self.launch(
            self.code.rmsnorm_back, (-(-rows // each),), dy, x, weight, rstd, dx,
            dy.stride(0), x.stride(0), dx.stride(0), rows, offset,
            HEADS=heads, WIDTH=width, ROWS=each, BLOCK=block, num_warps=_warps(each * block),
        )  # fmt: skip

    def gated(self, g: Tensor, u: Tensor, h: Tensor, kind: int) -> None:
        (rows, width), block = g.shape, min(1024, _power(g.shape[1]))
        self.launch(
            self.code.gated, (rows, -(-width // block)), g, u, h, g.stride(0), width, KIND=kind, BLOCK=block
        )  # fmt: skip

    def gated_back(self, dh: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor, kind: int) -> None:
        (rows, width), block = g.shape, min(1024, _power(g.shape[1]))
        self.launch(
            self.code.gated_back, (rows, -(-width // block)), dh, g, u, dg, du, g.stride(0), dg.stride(0), width,
            KIND=kind, BLOCK=block,
        )  # fmt: skip

    def cross_entropy(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None, nll: Tensor, softcap: float | None = None
    ) -> None:
        rows, vocabulary = logits.shape
        block = min(4096, _power(vocabulary))
        self.launch(
            self.code.cross_entropy, (rows,), logits, targets, nll if weights is None else weights, nll,
            logits.stride(0), vocabulary, float(softcap or 1.0),
            CAPPED=softcap is not None, GRADIENT=weights is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip

    def dropout(self, x: Tensor, y: Tensor, p: float, seed: int, *, add: bool = False) -> None:
        count, block = x.numel(), 1024
        self.launch(
            self.code.dropout, (-(-count // block),), x, y, device_seed(x.device), count, seed & 0x7FFFFFFF,
            threshold_of(p), 1 / (1 - p), ADD=add, BLOCK=block,
        )  # fmt: skip

    def heads(self, whole: Tensor, out: Tensor, rstd: Tensor | None, layout: HeadLayout) -> None:
        """Norms, then RoPE, of the heads in ``whole`` (T, columns); values are copied as they are.

        out: (T, H D + Hk D), or (T, columns) for values too where there are no norms; rstd: (T, H + Hk) fp32, or None
        without norms.
        """
        q, k, width = layout.queries, layout.keys, layout.width
        count, (each, block) = out.shape[1] // width, _head_tile(q + 2 * k, width)
        self.launch(
            self.code.heads, (len(whole), -(-count // each)), whole, out, layout.query_norm, layout.key_norm, rstd,
            layout.cosine, layout.sine, whole.stride(0), out.stride(0),
            layout.query_eps, layout.key_eps, layout.offset, Q=q, K=k, COUNT=count, WIDTH=width,
            ROT=_rotated(layout), NORMED=rstd is not None, HEADS=each, BLOCK=block,
        )  # fmt: skip

    def heads_back(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        grad: Tensor,
        whole: Tensor | None,
        rstd: Tensor | None,
        layout: HeadLayout,
    ) -> None:
        """grad (T, columns) of ``heads`` from those of queries (T, H D), keys and values (T, Hk D).

        whole, rstd: as ``heads`` got and left them; None without norms.
        """
        q, k, width = layout.queries, layout.keys, layout.width
        each, block = _head_tile(q + 2 * k, width)
        self.launch(
            self.code.heads_back, (len(grad), -(-(q + 2 * k) // each)), *grads, grad, whole, layout.query_norm,
            layout.key_norm, rstd, layout.cosine, layout.sine, *(g.stride(0) for g in grads), grad.stride(0),
            0 if whole is None else whole.stride(0), layout.offset, Q=q, K=k, V=k, WIDTH=width,
            ROT=_rotated(layout), NORMED=rstd is not None, HEADS=each, BLOCK=block,
        )  # fmt: skip


def _norm_tile(width: int) -> tuple[int, int]:
    """Heads of one program, and elements of each."""
    if width > WIDEST_NORM:
        raise ValueError(f"a norm over {width} elements")
    block = _power(width)
    return max(1, 1024 // block), block


def _head_tile(heads: int, width: int) -> tuple[int, int]:
    block = _power(width)
    return min(_power(heads), max(1, _TILE // block)), block


def _rotated(layout: HeadLayout) -> int:
    return 0 if layout.cosine is None else layout.cosine.shape[1]
