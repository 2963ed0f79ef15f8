"""A static batch over 4- and 8-bit base weights answers as transformers does with the same layers."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch

import tiny
from decode.static import Operations, static_engine, storages
from decode.test_engine import answers, prompts_of, reference
from decode.test_static_adapter import beside
from tell.decode import static_batch
from tell.decode.batch import PlainBatch
from tell.decode.engine import TOLERANCE, Engine
from tell.decode.layers import describe, kernels_take
from tell.decode.sampler import Decoding
from tell.decode.static_batch import StaticBatch
from tell.decode.static_model import JoinedProduct, StaticModel
from tell.decode.step_graphs import Unrecorded
from tell.train.step import Body
from train.packed import Fetches
from train.test_base_weight import quantised

KINDS = ["nf4", "int8"]


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch):
    monkeypatch.setattr(static_batch, "SHORTEST", 8)
    monkeypatch.setattr(static_batch, "ROWS", (1, 2, 4))


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(
    ("kind", "family"), [*(("nf4", name) for name in tiny.FAMILIES), ("int8", "qwen2"), ("int8", "gemma3")]
)
def test_greedy_equals_transformers(kind, family, tuned, tiny_model):
    model, theirs = (quantised(tiny_model(family), kind) for _ in range(2))
    engine, tape = static_engine(model)
    prompts, decoding = prompts_of((3, 45, 1), prefix=13), Decoding(9, (), greedy=True, batch_size=2)
    applied = beside if tuned else contextlib.nullcontext
    with applied(theirs):
        expected = reference(theirs, prompts, decoding)
    with applied(model), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decode")
        assert answers(engine, prompts, decoding) == expected
    assert engine.how == "static cache, CUDA graphs" and tape.repeats


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_states(kind, tiny_model):
    """In half precision too, with an adapter beside some of the layers: those of transformers' layers."""
    for dtype in (torch.float32, torch.bfloat16):
        body = Body(quantised(tiny_model("qwen2"), kind, dtype))
        prefix, *rows = prompts_of((45, 45, 1, 17), seed=1)
        with beside(body.causal, "some"):
            model, states = StaticModel(describe(body.core), body), []
            assert not any(isinstance(product, JoinedProduct) for layer in model.products for product in layer)
            for batch in (
                StaticBatch(model, Decoding(4, ()), 6, 75, prefix, Unrecorded()),
                PlainBatch(body, Decoding(4, ()), 6, 75, prefix, torch.device("cpu")),
            ):
                found = [batch.prefill(rows, 0), batch.decode([45, 1, 17], [5, 6, 7])]
                states.append(torch.cat(found).float())
        error = (states[0] - states[1]).norm(dim=1) / states[1].norm(dim=1)
        assert error.max() < (1e-5 if dtype == torch.float32 else TOLERANCE[dtype]), (dtype, error)


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "most"), [("nf4", 31), ("int8", 45)])
def test_a_step_reads_nothing_on_the_host_and_sends_nothing(kind, most, tiny_model):
    """It can be recorded; an operation of bitsandbytes counts as one launch."""
    body = Body(quantised(tiny_model("llama"), kind, torch.bfloat16))
    model, launches = StaticModel(describe(body.core), body), []
    batch = StaticBatch(model, Decoding(9, ()), 4, 40, [5, 6, 7, 8], Unrecorded())
    batch.start(batch.prefill([[3, 4, 5], [9, 9], [8]], 0), 0, [3, 2, 1], [np.zeros(9)] * 3)
    batch.step(3, 4)
    for _ in range(2):
        with Fetches() as fetches, Operations() as operations:
            batch.step(3, 4)
        assert fetches.names == []
        launches.append(operations.launches())
        made = {str(func) for func, args, kwargs, _ in operations.made if not storages((args, kwargs))}
        assert made <= {"aten.empty.memory_format", "aten.new_empty.default"}, made
        model.description.layers.pop()
    each = launches[0] - launches[1]
    print(f"{kind}: {each} launches in each layer")
    assert each == most


def test_a_plain_layer_next_to_quantised_ones(tiny_model):
    """Layers that bitsandbytes leaves alone."""
    model = quantised(tiny_model("qwen2"), "nf4")
    for layer in model.model.layers:
        whole = layer.self_attn.k_proj
        plain = torch.nn.Linear(whole.in_features, whole.out_features)
        plain.weight, plain.bias = torch.nn.Parameter(whole.dense(torch.float32)), whole.bias
        layer.self_attn.k_proj = plain.requires_grad_(False)
    engine, tape = static_engine(model)
    prompts, decoding = prompts_of((5, 9)), Decoding(8, (), greedy=True)
    assert answers(engine, prompts, decoding) == answers(Engine(model, fast=False), prompts, decoding)
    assert engine.trusted and tape.repeats


def test_kernels_of_a_cpu_do_not_take_it(tiny_model):
    model = quantised(tiny_model("llama"), "nf4")
    description = describe(Body(model).core)
    assert description.quantised and not kernels_take(description)
    engine = Engine(model)
    answers(engine, [[5, 6, 7]], Decoding(3, (), greedy=True))
    assert engine.how.endswith("(this machine has no kernels for the model with quantised weights)")
