"""Replaces the forward of a module; shared by the replacements for CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tell.train.attention import Plan, current_plan
from tell.train.torch_types import AnyModule
from tell.train.unmerged import adapted

Rope = tuple[Tensor, Tensor]  # cosine and sine of the tokens' positions


class Exchange:
    """A forward in place of ``module``'s own, made by ``make(module, *facts)`` at its first call.

    A closure would stay bound to the module it was made for; this follows a module that is copied or pickled.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], module: nn.Module, *facts: object) -> None:
        self.make, self.module, self.facts = make, module, facts
        self.forward: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.forward is None:
            attributes = vars(self.module)
            attributes.pop("forward", None)  # ``make`` looks up the module's own
            self.forward = self.make(self.module, *self.facts)
            attributes["forward"] = self
        return self.forward(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "forward": None}


def is_exchanged(module: nn.Module) -> bool:
    """Whether the module's forward is an ``Exchange``, its own or copied with it."""
    return isinstance(vars(module).get("forward"), Exchange)


def restore_forward(module: nn.Module) -> None:
    """Remove an ``Exchange`` from a module; any other replacement stays."""
    if is_exchanged(module):
        del module.forward


def is_frozen(*parameters: Tensor | None) -> bool:
    """Whether none of the parameters needs a gradient from the current pass."""
    return not (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters))


def is_plain(layer: nn.Linear) -> bool:
    """Whether calling the layer is just a product with its frozen weight, plus that of an adapter beside it.

    It has no hooks, and no other forward than `tell.train.unmerged.Adapted` over its own.
    """
    beside = adapted(layer)
    own = "forward" not in vars(layer) if beside is None else beside.own
    watched = layer._forward_hooks or layer._forward_pre_hooks
    return own and not watched and is_frozen(layer.weight, layer.bias)


def epsilon(norm: nn.Module) -> float:
    """What an RMS norm adds to the mean square, under either of transformers' names."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def split_qkv(module: AnyModule, whole: Tensor) -> tuple[Tensor, ...]:
    """Queries (..., H D), keys and values (..., Hk D) from the output of a merged ``qkv_proj``."""
    kv = module.num_key_value_heads * module.head_dim
    return whole.split([whole.shape[-1] - 2 * kv, kv, kv], dim=-1)


def planned_attention(
    module: nn.Module, attend: Callable[[Tensor, Rope, Any], Tensor], serves: Callable[[Plan, Tensor], bool]
) -> Callable[..., tuple[Tensor, None]]:
    """The forward of an attention module; falls back to the module's own for what ``attend`` cannot compute.

    Args:
        attend: (1, T, h) of states (1, T, h), cosine and sine (1, T, rot), and the current plan.
        serves: whether ``attend`` takes such a plan and such states.
    """
    original = module.forward

    def forward(
        hidden_states: Tensor,
        position_embeddings: Rope | None = None,
        attention_mask: Tensor | None = None,
        **rest: object,
    ) -> tuple[Tensor, None]:
        plan = current_plan()
        if (
            position_embeddings is not None
            and position_embeddings[0].dtype == hidden_states.dtype
            and serves(plan, hidden_states)
        ):
            return attend(hidden_states, position_embeddings, plan), None
        return original(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **rest,
        )

    return forward
