"""Frozen linear layers whose weights are kept in 4 or 8 bits, quantised by bitsandbytes.

One layer for both kinds, a plain ``nn.Linear`` to everything that only asks for its sizes or calls it. Its matrix is
computed again at each use, in training also for the backward pass, and freed after the product. Activations are never
quantised: the layer is the linear layer of its dequantised weight, in training as in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

INT8_LARGEST = 127.0


class _Context(Protocol):
    layer: QuantisedLinear


class QuantisedLinear(nn.Linear):
    """y = x W^T + b for a frozen W (N, K) in 4 or 8 bits.

    Args:
        packed: int8 (N, K), or 4-bit pairs in uint8.
        state: (N,) fp32 largest absolute value of each row of int8; bitsandbytes' state of 4-bit blocks.
        bias: (N,) or None.
        shape: (N, K).
        turned: the model's files have the weight as (K, N), as GPT-2's.
    """

    def __init__(
        self,
        packed: Tensor,
        state: Tensor | QuantState,
        bias: Tensor | None,
        shape: tuple[int, int],
        *,
        turned: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.state, self.turned = state, turned

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        super()._apply(fn, recurse)
        device = self.weight.device
        if isinstance(self.state, Tensor):
            self.state = self.state.to(device)
        elif self.state.absmax.device != device:
            self.state.to(device)
        return self

    def dequantise(self, out: Tensor) -> Tensor:
        """W written into ``out`` (N, K), contiguous and in a floating-point format; returns it."""
        if isinstance(self.state, Tensor):
            scale = (self.state / INT8_LARGEST)[:, None]
            return torch.mul(self.weight, scale, out=out)  # in fp32, rounded once
        from bitsandbytes.functional import dequantize_4bit

        if out.device.type == "cuda" and out.dtype == self.state.dtype:  # the only back end that writes in place
            dequantize_4bit(self.weight, self.state, out=out)
            return out
        return out.copy_(dequantize_4bit(self.weight, self.state))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (N, K) in a new tensor."""
        shape = self.out_features, self.in_features
        return self.dequantise(torch.empty(shape, dtype=dtype, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        if isinstance(self.state, Tensor) or x.dtype != self.state.dtype:
            return linear(x, self.dense(x.dtype), self.bias)
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self.weight, self.state, bias=self.bias)  # few rows never make W

    def extra_repr(self) -> str:
        kind = "int8" if isinstance(self.state, Tensor) else self.state.quant_type
        return f"{super().extra_repr()}, {kind}"


class _Product(torch.autograd.Function):
    """The layer with the gradient of its input; torch's own product would keep W for it, of every layer at once."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.dense(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dense(grad.dtype), None


def adopt_quantised(model: nn.Module) -> tuple[int, int]:
    """Replaces bitsandbytes' linear layers, which transformers made at loading, by `QuantisedLinear`.

    Returns:
        Weights in quantised layers, and all weights of the model.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    quantised = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear4bit | Linear8bitLt):
                layer = _adopted(child)
                setattr(parent, name, layer)
                quantised += layer.in_features * layer.out_features
    plain = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    return quantised, plain + quantised


def _adopted(layer: nn.Linear) -> QuantisedLinear:
    weight = cast(Any, layer.weight)
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = weight.SCB if weight.SCB is not None else cast(Any, layer).state.SCB
    bias = None if layer.bias is None else layer.bias.data
    # ``data`` of a subclass is of the subclass
    packed = weight.data.as_subclass(Tensor)
    turned = getattr(layer, "source_cls", nn.Linear).__name__ == "Conv1D"
    return QuantisedLinear(packed, state, bias, (layer.out_features, layer.in_features), turned=turned)
