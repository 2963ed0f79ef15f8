"""Adapters beside the weights: fused passes read them; what fails on the way in leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decode.static import Operations
from decode.test_static_adapter import beside
from tell.train.fast.fused_forwards import Projections
from tell.train.fast.stacked import Lora, Stack
from tell.train.row_losses import row_losses
from tell.train.states import hidden_states
from tell.train.unmerged import Adapted, adapter_unmerged, is_unmerged
from train.packed import load, make_rows, make_table

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [40]]


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


@pytest.mark.parametrize("part", ["all", "some"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_fused_passes_take_it(family, part, tiny_model, monkeypatch):
    """Losses and states equal those of the layers' own forwards, of which none is called; without it, those before."""
    model, table = load(tiny_model(family)), make_table(make_rows((30, 21, 9), prefix=4), "task")
    plain = row_losses(model, table)
    with monkeypatch.context() as context:
        context.setattr("tell.train.step.fuse_modules", lambda model: {})
        own = load(tiny_model(family))
        with beside(own, part):
            expected, states = row_losses(own, table), hidden_states(own, PROMPTS, [1, 2])
    called = []
    with beside(model, part), monkeypatch.context() as context:
        context.setattr(Adapted, "__call__", lambda self, x: called.append(self) or self.forward(x))
        found = row_losses(model, table)
        got = hidden_states(model, PROMPTS, [1, 2])
    assert not called
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(got, states, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, plain, rtol=1e-3)
    np.testing.assert_array_equal(row_losses(model, table), plain)


def test_what_lies_over_another_forward_is_called(tiny_model):
    """A layer whose forward under the adapter is not its own keeps both."""
    model = load(tiny_model("llama"))
    attention = model.model.layers[0].self_attn
    projections, x = Projections(attention, ["q_proj", "k_proj"]), torch.randn(5, 64)
    attention.q_proj.forward = lambda x: torch.nn.functional.linear(x, 2 * attention.q_proj.weight)
    with beside(model):
        assert projections.stack() is None
        for y, layer in zip(projections(x), projections.layers(), strict=True):
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize(("widths", "launches"), [((64, 32, 32), 6), ((96,), 3)])
def test_launches_of_a_fused_product_on_a_gpu(widths, launches):
    """The layers' product and the A's in one each, A joined first, and a product for each B: nothing is scaled."""
    x, weight = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (9, sum(widths)))
    pairs = [(x.new_empty(4, 64), x.new_empty(width, 4)) for width in widths]
    stack = Stack(weight, None, widths, tuple(1.0 for _ in widths), 0.0)
    with Operations() as operations:
        y, _ = Lora(stack, [factor for pair in pairs for factor in pair], x).forward(x)
    made = [func.overloadpacket.__name__ for func, *_ in operations.made if not func.is_view]
    assert y.shape == (9, sum(widths)) and len(made) == launches, made
