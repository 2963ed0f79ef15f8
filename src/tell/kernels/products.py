"""Products of bf16 tensors with a low-rank adapter: the kernels of ``train_product.c`` as functions.

All tensors are on the CPU, in bf16 unless said otherwise; their last dimension is contiguous, rows may be
strided.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, POINTER, Structure, addressof, byref, c_float, c_int, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tell.kernels.library import library
from tell.kernels.ops import threshold_of

_P, _N = c_void_p, c_int64


class _Task(Structure):
    """``train_product_task``."""

    _fields_ = [
        *((name, _N) for name in ("tokens", "outputs", "inputs", "rank")),
        *(("x", _P), ("x_stride", _N), ("weight", _P), ("weight_stride", _N), ("bias", _P)),
        *(("into", _P), ("into_stride", _N), ("out_of", _P), ("out_of_stride", _N), ("columns", _N)),
        *(("inner", _P), ("y", _P), ("y_stride", _N)),
        *(("adapters", _N), ("ends", _P), ("threshold", c_uint32), ("seed", c_uint32)),
    ]


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout that keeps elements as they are: their scale 1 / (1 - rate) is left to the caller.

    Attributes:
        rate: share of elements that are dropped; 0 for none.
        seed: of the first adapter's mask, as for the kernel ``dropout``; each adapter has the next.
    """

    rate: float = 0.0
    seed: int = 0


KEEP = Dropout()


class Products:
    """The products; ``products_for`` says where they can be used."""

    def __init__(self, shared: CDLL) -> None:
        self._product, self._outer = shared.train_product, shared.train_outer
        self._product.argtypes, self._product.restype = (POINTER(_Task),), None
        self._outer.argtypes = (_N, _N, _N, _P, _N, _P, _N, c_float, _P, c_int, c_uint32, c_uint32)
        self._outer.restype = None

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        a: Tensor | None = None,
        b: Tensor | None = None,
        ends: Sequence[int] = (),
        dropout: Dropout = KEEP,
    ) -> tuple[Tensor, Tensor | None]:
        """y = x W^T + bias + u B^T for x (T, K), W (N, K), A (R, K), B (N, R), and u = kept(x) A^T.

        ``ends`` of the ranks of each adapter among the R, the last being R; even ones where there is dropout.
        """
        return self._run(x, weight, bias, a, b, ends, dropout, columns=False)

    def backward(
        self,
        gy: Tensor,
        weight: Tensor,
        b: Tensor | None = None,
        a: Tensor | None = None,
        ends: Sequence[int] = (),
        dropout: Dropout = KEEP,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x, (T, K) = gy W + the sum of kept(gu A) over adapters, and of u, gu = gy B."""
        return self._run(gy, weight, None, b, a, ends, dropout, columns=True)

    def _run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        into: Tensor | None,
        out_of: Tensor | None,
        ends: Sequence[int],
        dropout: Dropout,
        *,
        columns: bool,
    ) -> tuple[Tensor, Tensor | None]:
        outputs = weight.shape[1 if columns else 0]
        y, inner, rank = x.new_empty(len(x), outputs), None, 0
        if out_of is not None:
            rank = out_of.shape[0 if columns else 1]
            inner = x.new_empty(len(x), rank + rank % 2)  # the kernel reads pairs
        limits = (_N * len(ends))(*ends)
        self._product(
            byref(
                _Task(
                    len(x), outputs, x.shape[1], rank, x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
                    _at(bias), _at(into), _stride(into), _at(out_of), _stride(out_of), columns, _at(inner),
                    y.data_ptr(), y.stride(0), len(ends), addressof(limits), threshold_of(dropout.rate), dropout.seed,
                )
            )
        )  # fmt: skip
        return y, None if inner is None else inner[:, :rank]

    def outer(
        self, g: Tensor, x: Tensor, scale: float = 1.0, *, transposed: bool = False, dropout: Dropout = KEEP
    ) -> Tensor:
        """scale g^T kept(x), fp32, of g (T, R) and x (T, K): (R, K), or (K, R)."""
        rank, columns = g.shape[1], x.shape[1]
        out = torch.empty((columns, rank) if transposed else (rank, columns))
        self._outer(
            len(x), rank, columns, g.data_ptr(), g.stride(0), x.data_ptr(), x.stride(0), scale, out.data_ptr(),
            transposed, threshold_of(dropout.rate), dropout.seed,
        )  # fmt: skip
        return out


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


@lru_cache(maxsize=1)
def _products() -> tuple[Products, int] | None:
    shared = library()
    if shared is None:
        return None
    shared.train_product_rows.restype = _N
    rows = int(shared.train_product_rows())
    return (Products(shared), rows) if rows else None


def products_for(x: Tensor) -> Products | None:
    """The products for rows x (T, K); None where the library's own are to be used (device, format, few rows)."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or x.shape[1] % 2 or x.stride(1) != 1:
        return None
    found = _products()  # compiles them where they are not yet
    return found[0] if found is not None and len(x) >= found[1] else None
