"""The decoding kernels of ``decode.c`` as Python calls on tensors.

All tensors are on the CPU, are contiguous and of one dtype, bf16 or fp32, unless a name says otherwise.
"""

from __future__ import annotations

import ctypes
import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tell.kernels.library import library

by_reference = ctypes.byref

LANES = 16  # keys side by side in a cache; capacities are multiples of it
QUERIES = 32  # the most query heads that may share a key head
TOP_K = 256  # candidates the sampler can hold

_I64, _F32, _PTR = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_ARGUMENTS = {
    "embed": [_I64, _I64, _PTR, _PTR, _F32, _PTR, _F32, _PTR, _PTR],
    "add_norm": [_I64, _I64, _PTR, _PTR, _PTR, _PTR, _F32, _PTR],
    "gate": [_I64, _I64, _I64, _PTR, _PTR],
    "attend": [_PTR, _PTR, _I64, _PTR, _PTR],
    "sample": [_PTR, _I64, _PTR, _PTR, _PTR, _PTR, _PTR],
}


class LayerArguments(ctypes.Structure):
    """``decode_layer``: the attention parameters of one layer, pointers borrowed from tensors."""

    _fields_ = [
        *((name, _I64) for name in ("heads", "kv_heads", "width", "rotary", "slots", "capacity", "prefix")),
        *((name, _I64) for name in ("prefix_capacity", "window")),
        *((name, _F32) for name in ("scaling", "softcap", "eps")),
        *((name, _PTR) for name in ("cosine", "sine", "query_norm", "key_norm", "keys", "values")),
        *((name, _PTR) for name in ("prefix_keys", "prefix_values")),
    ]


class TokenArguments(ctypes.Structure):
    """``decode_tokens``: int32 slot and place of each token."""

    _fields_ = [("slot", _PTR), ("at", _PTR)]


class RuleArguments(ctypes.Structure):
    """``decode_rule``: how the next token is chosen."""

    _fields_ = [
        *((name, _I64) for name in ("vocabulary", "top_k", "banned_count", "greedy")),
        *((name, _F32) for name in ("temperature", "top_p", "penalty", "softcap")),
        ("banned", _PTR),
    ]


class Kernels:
    """Entry points for one dtype; ``kernels`` makes them."""

    def __init__(self, loaded: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._c = SimpleNamespace()
        for name, arguments in _ARGUMENTS.items():
            function = getattr(loaded, f"decode_{name}_{_SUFFIX[dtype]}")
            function.argtypes, function.restype = arguments, None
            setattr(self._c, name, function)

    def embed(
        self, table: Tensor, ids: Tensor, scale: float, weight: Tensor, eps: float, residual: Tensor, out: Tensor
    ) -> None:
        """residual (n, h) = table[ids] * scale; out = norm(residual) * weight (h, fp32)."""
        n, h = residual.shape
        pointers = table.data_ptr(), ids.data_ptr(), scale, weight.data_ptr(), eps
        self._c.embed(n, h, *pointers, residual.data_ptr(), out.data_ptr())

    def add_norm(self, residual: Tensor, delta: Tensor, post: int | None, weight: int, eps: float, out: Tensor) -> None:
        """residual (n, h) += delta, normed with ``post`` where given; out = norm(residual) * weight.

        Both weights (h, fp32) are given by address.
        """
        n, h = residual.shape
        self._c.add_norm(n, h, residual.data_ptr(), delta.data_ptr(), post, weight, eps, out.data_ptr())

    def gate(self, x: Tensor, kind: int, out: Tensor) -> None:
        """out (n, m) = act(x[:, :m]) * x[:, m:]; kind 0 is SiLU, 1 GELU by tanh."""
        self._c.gate(*out.shape, kind, x.data_ptr(), out.data_ptr())

    def attend(self, layer: int, tokens: object, qkv: Tensor, out: Tensor) -> None:
        """out (n, H D) of qkv (n, (H + 2 Hk) D): positions, cache write, attention; layer and tokens by reference."""
        self._c.attend(layer, tokens, len(qkv), qkv.data_ptr(), out.data_ptr())

    def sample(self, rule: Any, logits: Tensor, slot: Tensor, seen: Tensor, draws: Tensor) -> Tensor:
        """(n,) int64 next tokens of logits (n, V); slot (n,) int32, seen (slots, V) uint8, draws (n,) fp32."""
        chosen = torch.empty(len(logits), dtype=torch.int64)
        pointers = (x.data_ptr() for x in (logits, slot, seen, draws, chosen))
        self._c.sample(rule, len(logits), *pointers)
        return chosen


class PackedWeight:
    """A bf16 weight laid out for products of few rows; see ``decode_product.c``.

    Args:
        weight: (o, i) bf16, i even.
        bias: (o,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        loaded = library()
        assert loaded is not None, "call packs_weights() first"
        self.outputs, self.inputs = weight.shape
        panel = loaded.decode_product_panel()
        weight = weight.contiguous()
        self.packed = torch.empty(-(-self.outputs // panel) * panel * self.inputs, dtype=torch.bfloat16)
        pack, self._product = loaded.decode_pack, loaded.decode_product
        pack.argtypes, pack.restype = [_I64, _I64, _PTR, _PTR], None
        self._product.argtypes, self._product.restype = [_I64, _I64, _I64, _PTR, _PTR, _PTR, _PTR], None
        pack(self.outputs, self.inputs, weight.data_ptr(), self.packed.data_ptr())
        self.bias = None if bias is None else bias.float().contiguous()
        self._fixed = self.packed.data_ptr(), None if self.bias is None else self.bias.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        """(n, o) of contiguous x (n, i) bf16."""
        y = torch.empty(len(x), self.outputs, dtype=torch.bfloat16)
        self._product(len(x), self.inputs, self.outputs, x.data_ptr(), *self._fixed, y.data_ptr())
        return y


def packs_weights(weight: Tensor) -> bool:
    """Whether ``PackedWeight`` takes this weight on this CPU."""
    loaded = library()
    if loaded is None or weight.dtype != torch.bfloat16 or weight.shape[1] % 2:
        return False
    loaded.decode_product_panel.restype = _I64
    return loaded.decode_product_panel() > 0


@functools.cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for bf16 or fp32; None where they are not available."""
    loaded = library()
    return Kernels(loaded, dtype) if loaded is not None and dtype in _SUFFIX else None
