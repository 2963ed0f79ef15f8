"""An adapter applied beside the weights: y + s (x A^T) B^T after each adapted layer, which keeps its own weight.

Costs two thin products a layer where merging costs a copy of the adapted weights, and serves quantised weights, which
nothing can be merged into. Fused forwards and the static decoder of a GPU read the factors instead of calling the
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_unmerged: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, slots=True)
class Adapted:
    """The forward of a layer with an adapter beside it.

    Attributes:
        forward: of the layer without it.
        a: (r, in)
        b: (out, r) times the scale.
        own: ``forward`` is the layer's own, not another replacement.
    """

    forward: Callable[..., Tensor]
    a: Tensor
    b: Tensor
    own: bool

    def __call__(self, x: Tensor) -> Tensor:
        y = self.forward(x)
        inner = x.reshape(-1, x.shape[-1]) @ self.a.t()
        return torch.addmm(y.reshape(-1, y.shape[-1]), inner, self.b.t()).view(y.shape)


def adapted(layer: nn.Module) -> Adapted | None:
    """The forward with an adapter, if one is applied beside ``layer`` now."""
    found = vars(layer).get("forward")
    return found if isinstance(found, Adapted) else None


@contextmanager
def adapter_unmerged(
    model: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float
) -> Iterator[None]:
    """Inside, ``model`` computes with an adapter; no weight is touched. The layers' forwards are restored at the end.

    Code that reads a layer's weight instead of calling it would miss the adapter: it can tell such a layer by the
    ``forward`` among its own attributes, as `tell.train.fast.exchange.is_plain` does.

    Args:
        factors: A (r, in) and B (out, r) by module name.
        scale: of B A.
    """
    device, dtype = model.device, model.dtype  # where states are; a layer's weight may be elsewhere
    before: dict[nn.Module, Callable[..., Tensor] | None] = {}
    try:
        for name, (a, b) in factors.items():
            layer = model.get_submodule(name)
            thin = (b.to(device, torch.float32) * scale).to(dtype)
            replaced = vars(layer).get("forward")
            product = Adapted(layer.forward, a.to(device, dtype), thin, replaced is None)  # memory may end here:
            before[layer] = replaced  # nothing was set yet
            setattr(layer, "forward", product)  # noqa: B010
        _unmerged.add(model)
        yield
    finally:
        _unmerged.discard(model)
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                setattr(layer, "forward", forward)  # noqa: B010


def is_unmerged(model: nn.Module) -> bool:
    """Whether an adapter is applied beside the weights of ``model`` now."""
    return model in _unmerged


def beside_shape(model: nn.Module) -> tuple[tuple[str, int], ...]:
    """Name and rank of each layer with an adapter beside it now."""
    if not is_unmerged(model):
        return ()
    layers = ((name, adapted(layer)) for name, layer in model.named_modules())
    return tuple((name, len(found.a)) for name, found in layers if found is not None)
