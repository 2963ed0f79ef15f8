"""Adapters beside the weights: what fails on the way in is raised as it is, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch

from tell.train.unmerged import adapter_unmerged, is_unmerged
from train.packed import load


class Large(torch.Tensor):
    """A factor that its device has no room for."""

    def to(self, *_, **__):
        raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize("held", [False, True])
def test_the_end_of_memory_is_what_is_raised(held, tiny_model):
    model = load(tiny_model("llama"))
    layers = [model.model.layers[i].self_attn.q_proj for i in (0, 1)]
    own = layers[1].forward
    if held:  # a forward that was set by someone else
        layers[1].forward = own
    a, b = torch.zeros(2, layers[0].in_features), torch.zeros(layers[0].out_features, 2)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    factors = {names[0]: (a, b), names[1]: (a.as_subclass(Large), b)}
    with pytest.raises(torch.OutOfMemoryError, match="no room"), adapter_unmerged(model, factors, 1.0):
        pass
    assert not is_unmerged(model)
    assert "forward" not in vars(layers[0]) and ("forward" in vars(layers[1])) == held
