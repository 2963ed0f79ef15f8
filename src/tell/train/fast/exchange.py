"""A forward put in place of a module's own, and what the replacements have in common on processor and GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tell.train.attention import Rule, current_plan


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


def epsilon(norm: Any) -> float:
    """What an RMS norm adds to the mean square, under either name that transformers has for it."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def split_qkv(module: Any, whole: Tensor) -> tuple[Tensor, ...]:
    """Queries (..., H D), keys and values (..., Hk D) out of what a merged ``qkv_proj`` gives."""
    kv = module.num_key_value_heads * module.head_dim
    return whole.split([whole.shape[-1] - 2 * kv, kv, kv], dim=-1)


def planned_attention(
    module: Any,
    attend: Callable[[Tensor, tuple[Tensor, Tensor], Any, Rule], Tensor],
    serves: Callable[[Any, Tensor], bool],
) -> Callable[..., tuple[Tensor, None]]:
    """The forward of an attention module that leaves to the module's own what ``attend`` cannot compute.

    Args:
        attend: (1, T, h) of states (1, T, h), cosine and sine (1, T, rot), the plan under way and the layer's rule.
        serves: whether ``attend`` takes such a plan and such states.
    """
    original = module.forward

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        plan, rule = current_plan(), getattr(module, "_tell_rule", None)
        usable = (
            isinstance(rule, Rule)
            and rule.softcap is None
            and position_embeddings is not None
            and position_embeddings[0].dtype == hidden_states.dtype
            and serves(plan, hidden_states)
        )
        if usable:
            return attend(hidden_states, position_embeddings, plan, rule), None
        return original(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **rest,
        )

    return forward
