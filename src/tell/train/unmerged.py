"""An adapter applied beside the weights: y + s (x A^T) B^T after each adapted layer, which keeps its own weight.

Costs two thin products a layer where merging costs a copy of the adapted weights, and serves quantised weights, which
nothing can be merged into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_unmerged: WeakSet[nn.Module] = WeakSet()


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
            adapted = _with_adapter(layer.forward, a.to(device, dtype), thin)  # memory may end here: nothing is set yet
            before[layer] = vars(layer).get("forward")
            setattr(layer, "forward", adapted)  # noqa: B010
        _unmerged.add(model)
        yield
    finally:
        _unmerged.discard(model)
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                setattr(layer, "forward", forward)  # noqa: B010


def _with_adapter(forward: Callable[..., Tensor], a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    def adapted(x: Tensor) -> Tensor:
        y = forward(x)
        inner = x.reshape(-1, x.shape[-1]) @ a.t()
        return torch.addmm(y.reshape(-1, y.shape[-1]), inner, b.t()).view(y.shape)

    return adapted


def is_unmerged(model: nn.Module) -> bool:
    """Whether an adapter is applied beside the weights of ``model`` now."""
    return model in _unmerged
