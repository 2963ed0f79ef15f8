"""Recomputation of decoder layers: the first ones keep only their input for the backward pass, and run once more there.

transformers' own gradient checkpointing does not serve packed rows: a layer that runs again in the backward pass has
left ``use_plan``, on a GPU even in another thread. Here the plan is reopened. Random states are restored, so that
dropout draws the same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tell.errors import TellError
from tell.train.attention import current_plan, use_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Recompute:
    """Decoder layers, of which the first ``level`` are recomputed in the backward pass.

    Attributes:
        layers: in their order.
        level: may change between passes.
        watch: entered around each layer that is not recomputed, given its number; to count what it keeps.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers, self.level = list(layers), 0
        self.watch: Callable[[int], AbstractContextManager[object]] | None = None

    def forward(self, number: int, original: Callable[..., Any], *args: object, **kwargs: object) -> object:
        """The outputs of a layer, whose forward is ``original``."""
        if number >= self.level or not torch.is_grad_enabled():
            with self.watch(number) if self.watch else nullcontext():
                return original(*args, **kwargs)
        plan = current_plan()

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), use_plan(plan)

        again: object = checkpoint(partial(original, **kwargs), *args, use_reentrant=False, context_fn=contexts)
        return again


@contextmanager
def recomputed_layers(model: PreTrainedModel, level: int | None = None) -> Iterator[Recompute]:
    """Inside this context the layers of a causal model pass through a ``Recompute``.

    Args:
        level: at first; None: 0.

    Raises:
        TellError: layers are to be recomputed, but the model does not say which modules they are.
    """
    recompute = Recompute(decoder_layers(model))
    if level and not recompute.layers:
        what = f"{type(model).__name__} does not say which modules are its layers"
        raise TellError(what, where="train.recompute", remedy="Use train.recompute=off.")
    recompute.level = min(level or 0, len(recompute.layers))
    before = [vars(layer).get("forward") for layer in recompute.layers]
    try:
        for number, layer in enumerate(recompute.layers):
            setattr(layer, "forward", _wrapped(recompute, number, layer.forward))  # noqa: B010
        yield recompute
    finally:
        for layer, forward in zip(recompute.layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = forward


def _wrapped(recompute: Recompute, number: int, original: Callable[..., Any]) -> Callable[..., object]:
    def forward(*args: object, **kwargs: object) -> object:
        return recompute.forward(number, original, *args, **kwargs)

    return forward


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a causal model, in order; [] where it does not say which modules they are."""
    names = set(model._no_split_modules or ())
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and type(module[0]).__name__ in names:
            return list(module)
    return []
