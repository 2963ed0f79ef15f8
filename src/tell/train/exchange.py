"""A forward put in place of a module's own, and when a linear layer may be left out of account."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Exchange:
    """A forward in place of ``module``'s own, made by ``make(module, *facts)`` at its first call.

    A function would stay tied to the module it was made for; this follows a module that is copied or pickled.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], module: nn.Module, *facts: Any) -> None:
        self.make, self.module, self.facts = make, module, facts
        self.forward: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.forward is None:
            attributes = vars(self.module)
            attributes.pop("forward", None)  # ``make`` looks up what the module computes by itself
            self.forward = self.make(self.module, *self.facts)
            attributes["forward"] = self
        return self.forward(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "forward": None}


def restore_forward(module: nn.Module) -> None:
    """Take an ``Exchange`` off a module; anybody else's forward stays."""
    if isinstance(vars(module).get("forward"), Exchange):
        del module.forward


def is_frozen(*parameters: Tensor | None) -> bool:
    """Whether none of the parameters wants a gradient from the pass under way."""
    return not (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters))


def is_plain(layer: nn.Linear) -> bool:
    """Whether a product with its frozen weight is all that calling the layer does: no hooks, no forward of its own."""
    watched = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    return not watched and is_frozen(layer.weight, layer.bias)
