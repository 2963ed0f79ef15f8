"""Frozen base weights as the fused products read them: plain tensors, or quantised layers made dense at each use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tell.kernels.quantised import QuantisedLinear

LINEAR = (nn.Linear, QuantisedLinear)  # layers that are a product with their weight and no more, by their exact type


@dataclass(frozen=True, slots=True)
class Quantised:
    """Weights of layers over one input, one below the other, at least one of them quantised; no dense copy is kept."""

    layers: tuple[nn.Linear, ...]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(N, K) in a new tensor, filled layer by layer."""
        widths = [layer.out_features for layer in self.layers]
        first = self.layers[0]
        whole = torch.empty(sum(widths), first.in_features, dtype=dtype, device=first.weight.device)
        for layer, part in zip(self.layers, whole.split(widths), strict=True):
            if isinstance(layer, QuantisedLinear):
                layer.dequantise(part)
            else:
                part.copy_(layer.weight)
        return whole


def quantised_weight(layers: Sequence[nn.Linear]) -> Quantised | None:
    """What `dense` makes the layers' joined weight of; None where no layer is quantised."""
    return Quantised(tuple(layers)) if any(isinstance(layer, QuantisedLinear) for layer in layers) else None


def parameter_count(model: nn.Module) -> int:
    """All weights of a model; those of a quantised layer as many as its matrix has, however they are packed."""
    quantised = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    packed = {id(layer.weight) for layer in quantised}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    return plain + sum(layer.in_features * layer.out_features for layer in quantised)


def dense(weight: Tensor | Quantised, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) of a base weight: itself where it is plain, else a new tensor in ``dtype``.

    Hold the result no longer than a product needs it; the allocator hands the next layer the same memory.
    """
    return weight.dense(dtype) if isinstance(weight, Quantised) else weight
