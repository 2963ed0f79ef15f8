"""Recomputed layers: the same numbers with less kept."""

from __future__ import annotations

import threading

import pytest
import torch

import tiny
from tell.config_sections import TrainConfig
from tell.errors import TellError
from tell.train.lora import add_lora
from tell.train.packing import packed_plan
from tell.train.plain import PlainBody, plain_step_loss
from tell.train.recompute import decoder_layers, recomputed_layers
from tell.train.step import Body, StepRules, step_loss
from train.packed import gradients, load, make_rows, wake

ROWS = make_rows([50, 41, 33, 27, 20], prefix=12, task=(0, 1))
ALL = 10**6  # every layer


def gradients_of(folder, level, *, dropout=0.0, fast=True):
    """A step's loss, its gradients, calls of the first layer, and the random state after it."""
    config = TrainConfig(lora_dropout=dropout, lora_r=4)
    base = load(folder)
    model = add_lora(base, config, seed=3, fused=fast)
    wake(model)
    body = Body(model) if fast else PlainBody(model)
    rules = StepRules("example", micro_tokens=90, share_prefix=dropout == 0)
    torch.manual_seed(11)
    with recomputed_layers(base, level) as layers:
        calls = [0]
        counted(layers.layers[0], calls)
        out = (step_loss if fast else plain_step_loss)(body, ROWS, rules)
    return out, gradients(model), calls[0], torch.get_rng_state()


def counted(module, calls):
    def hook(*_):
        calls[0] += 1

    module.input_layernorm.register_forward_hook(hook)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_losses_and_gradients_are_exactly_the_same(family, dropout, tiny_model):
    """With and without a shared prefix, and with dropout, whose masks must be drawn again."""
    folder = tiny_model(family)
    whole, expected, once, after = gradients_of(folder, None, dropout=dropout)
    for level in (1, ALL):
        out, found, calls, state = gradients_of(folder, level, dropout=dropout)
        assert out.loss == whole.loss and (out.rows == whole.rows).all()
        assert found.keys() == expected.keys() and expected
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert calls == 2 * once and torch.equal(state, after)  # it did run again


def test_the_plain_path_too(tiny_model):
    whole, expected, once, *_ = gradients_of(tiny_model("llama"), None, dropout=0.3, fast=False)
    out, found, calls, *_ = gradients_of(tiny_model("llama"), ALL, dropout=0.3, fast=False)
    assert out.loss == whole.loss and calls == 2 * once
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_backward_pass_of_a_gpu_runs_in_another_thread(tiny_model):
    """Where no plan is in use, since it is a context variable."""
    model = add_lora(base := load(tiny_model("llama")), TrainConfig(lora_dropout=0.0), seed=3)
    wake(model)
    body = Body(model)
    found = []
    for level in (0, ALL):
        with recomputed_layers(base, level):
            states = body.run(packed_plan([20, 9]), torch.arange(29))
            thread = threading.Thread(target=states.square().sum().backward)
            thread.start()
            thread.join()
        found.append(gradients(model))
        model.zero_grad(set_to_none=True)
    assert found[0] and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_layers_are_found_and_given_back(tiny_model):
    for family in tiny.FAMILIES:
        model = load(tiny_model(family))
        layers = decoder_layers(model)
        assert len(layers) == model.config.num_hidden_layers
        with recomputed_layers(model, ALL) as recompute:
            assert recompute.level == len(layers) and all("forward" in vars(layer) for layer in layers)
        assert not any("forward" in vars(layer) for layer in layers)
    model._no_split_modules = None
    with recomputed_layers(model) as recompute:
        assert recompute.layers == []
    with pytest.raises(TellError, match="recompute"), recomputed_layers(model, 1):
        pass


def test_nothing_is_recomputed_without_gradients(tiny_model):
    model = load(tiny_model("llama"))
    body = Body(model)
    with recomputed_layers(model, ALL) as layers, torch.no_grad():
        calls = [0]
        counted(layers.layers[0], calls)
        body.run(packed_plan([9]), torch.arange(9))
    assert calls == [1]
