"""Optimiser state, taken and put back."""

from __future__ import annotations

import pytest
import torch

from tell.train.checkpoint import load_state, state_tensors

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def make(device: str, fused: bool):
    weight = torch.nn.Parameter(torch.ones(4, 4, device=device))
    return {"w": weight}, torch.optim.AdamW([weight], lr=0.1, fused=fused)


def step(parameters, optimizer):
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_the_step_is_where_the_optimizer_reads_it(fused):
    """A fused AdamW hands its address to a kernel on the parameter's device; "meta" stands for a GPU."""
    parameters, optimizer = make("cpu", fused)
    step(parameters, optimizer)
    tensors = state_tensors(parameters, optimizer)
    elsewhere, other = make("meta", fused=False)
    other.defaults["fused"] = fused
    load_state(tensors, elsewhere, other)
    state = other.state[elsewhere["w"]]
    assert {key: value.device.type for key, value in state.items()} == {
        "exp_avg": "meta", "exp_avg_sq": "meta", "step": "meta" if fused else "cpu"
    }  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_a_resumed_step_is_the_step_that_would_have_followed(device):
    parameters, optimizer = make(device, True)
    step(parameters, optimizer)
    kept = {key: value.clone() for key, value in state_tensors(parameters, optimizer).items()}
    step(parameters, optimizer)
    expected = parameters["w"].detach().clone()
    load_state(kept, parameters, resumed := torch.optim.AdamW(parameters.values(), lr=0.1, fused=True))
    step(parameters, resumed)
    assert torch.equal(parameters["w"], expected)
