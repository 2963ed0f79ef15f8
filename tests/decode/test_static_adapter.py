"""A static batch takes an adapter beside the weights into its steps, and answers as the adapted model does."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import tiny
from decode.static import Operations, static_engine
from decode.test_engine import answers, prompts_of, reference
from tell.config_sections import TrainConfig
from tell.decode import static_batch
from tell.decode.batch import PlainBatch
from tell.decode.engine import TOLERANCE, Engine
from tell.decode.layers import describe, kernels_take
from tell.decode.sampler import Decoding
from tell.decode.static_batch import StaticBatch
from tell.decode.static_model import JoinedProduct, StaticModel
from tell.decode.step_graphs import Unrecorded
from tell.models.find import find_model
from tell.models.machine import Place
from tell.models.predict import Load, predict_memory
from tell.train import lora
from tell.train.step import Body
from tell.train.unmerged import adapted, adapter_unmerged
from train.packed import Fetches, load, wake

PARTS = {"all": "", "some": ("q_proj", "v_proj", "qkv_proj", "up_proj", "down_proj")}


@pytest.fixture(autouse=True)
def _beside(monkeypatch):
    """Small sizes of steps; no adapter is merged."""
    monkeypatch.setattr(static_batch, "SHORTEST", 8)
    monkeypatch.setattr(static_batch, "ROWS", (1, 2, 4))
    monkeypatch.setattr(lora, "_room_for_copies", lambda weights: False)


@contextmanager
def beside(model, part="all", rank=4):
    """An adapter of random factors beside some linear layers."""
    generator, factors = torch.Generator().manual_seed(3), {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head" and name.endswith(PARTS[part]):
            a = torch.randn(rank, layer.in_features, generator=generator) * 0.1
            factors[name] = a, torch.randn(layer.out_features, rank, generator=generator) * 0.1
    with adapter_unmerged(model, factors, 0.5):
        yield


@pytest.mark.parametrize(("family", "part"), [*((name, "all") for name in tiny.FAMILIES), ("qwen3", "some")])
def test_greedy_equals_transformers(family, part, tiny_model):
    model, theirs = (load(tiny_model(family)) for _ in range(2))
    engine, tape = static_engine(model)
    prompts, decoding = prompts_of((3, 45, 1), prefix=13), Decoding(9, (), greedy=True, batch_size=2)
    plain = answers(engine, prompts, decoding)
    with beside(theirs, part):
        expected, records = reference(theirs, prompts, decoding), tape.records
    with beside(model, part), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decode")
        assert answers(engine, prompts, decoding) == expected != plain
        assert engine.how == "static cache, CUDA graphs" and tape.records > records
    assert answers(engine, prompts, decoding) == plain


@torch.inference_mode()
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_states(family, tiny_model):
    """In every number format, joined weights or not: those of transformers' layers, within rounding."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        body = Body(load(tiny_model(family), dtype=dtype))
        prefix, *rows = prompts_of((45, 45, 1, 17), seed=1)
        with beside(body.causal, "some"):
            for join in (True, False):
                states = []
                for batch in (
                    StaticBatch(
                        StaticModel(describe(body.core), body, join=join), Decoding(4, ()), 6, 75, prefix, Unrecorded()
                    ),
                    PlainBatch(body, Decoding(4, ()), 6, 75, prefix, torch.device("cpu")),
                ):
                    found = [batch.prefill(rows, 0), batch.decode([45, 1, 17], [5, 6, 7])]
                    states.append(torch.cat(found).float())
                error = (states[0] - states[1]).norm(dim=1) / states[1].norm(dim=1)
                assert error.max() < (1e-5 if dtype == torch.float32 else TOLERANCE[dtype]), (dtype, join, error)


@torch.inference_mode()
def test_an_adapter_costs_two_launches_for_layers_with_one_input(tiny_model):
    body, launches = Body(load(tiny_model("llama"), dtype=torch.bfloat16)), []

    def counted():
        model = StaticModel(describe(body.core), body, join=True)
        batch = StaticBatch(model, Decoding(9, ()), 4, 40, [5, 6, 7, 8], Unrecorded())
        batch.start(batch.prefill([[3, 4, 5], [9, 9], [8]], 0), 0, [3, 2, 1], [np.zeros(9)] * 3)
        batch.step(3, 4)
        with Fetches() as fetches, Operations() as operations:
            batch.step(3, 4)
        assert fetches.names == []
        launches.append(operations.launches())
        return len(model.products)

    counted()
    with beside(body.causal):
        layers = counted()
    print(f"adapter: {(launches[1] - launches[0]) / layers:g} launches more in each layer")
    assert launches[1] - launches[0] == 8 * layers


def test_products_of_an_adapter_are_compared_before_they_are_trusted(tiny_model, tmp_path, monkeypatch):
    """Also by an engine that trusts the model without it, which it does again afterwards."""
    tuned = lora.add_lora(load(tiny_model("llama")), TrainConfig(lora_r=4), seed=1)
    wake(tuned)
    lora.save_adapter(tuned, tmp_path)
    model = lora.remove_lora(tuned)
    engine, tape = static_engine(model)
    prompts, decoding = prompts_of((5, 9)), Decoding(8, (), greedy=True)
    plain = answers(engine, prompts, decoding)
    with engine.adapter(tmp_path):
        adapted = answers(engine, prompts, decoding)
        assert adapted == answers(Engine(model, fast=False), prompts, decoding) != plain
        assert engine.trusted is True and engine.how.startswith("static cache")
    monkeypatch.setattr(JoinedProduct, "_adapt", lambda self, out, x: None)
    engine, tape = static_engine(model)
    assert answers(engine, prompts, decoding) == plain
    with engine.adapter(tmp_path), pytest.warns(UserWarning, match="differs on this model"):
        assert answers(engine, prompts, decoding) == adapted and engine.trusted is False
    assert engine.trusted is True
    runs = tape.runs
    assert answers(engine, prompts, decoding) == plain and tape.runs > runs
    with engine.adapter(tmp_path):
        assert answers(engine, prompts, decoding) == adapted
        assert engine.how == "transformers' layers (the faster implementation differs on this model)"


def test_the_products_of_one_shape_are_compared_once(tiny_model, monkeypatch):
    """As `tell serve` applies its adapter before each batch; other layers or ranks are another shape."""
    checked, check = [], Engine._check
    monkeypatch.setattr(Engine, "_check", lambda self, *given: checked.append(self.trusted) or check(self, *given))
    model = load(tiny_model("llama"))
    engine, _ = static_engine(model)
    decoding = Decoding(3, (), greedy=True)
    for part, rank, checks in (("all", 4, 1), ("all", 4, 1), ("some", 4, 2), ("all", 3, 3), ("some", 4, 3)):
        with beside(model, part, rank):
            answers(engine, [[5, 6]], decoding)
            assert engine.trusted is True and len(checked) == checks
    assert engine.trusted is None and checked == [None] * 3


def test_an_adapter_is_no_reason_where_there_are_no_kernels(tiny_model, monkeypatch):
    monkeypatch.setattr("tell.decode.engine.kernels", lambda dtype: None)
    model = load(tiny_model("llama"))
    engine = Engine(model)
    with beside(model):
        answers(engine, [[5, 6, 7]], Decoding(3, (), greedy=True))
    assert engine.how == "transformers' layers (this machine has no kernels for the model)"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_memory_of_evaluation_counts_it(family, tiny_model):
    """The factors, and their copies that the decoder joins."""
    files = find_model(str(tiny_model(family)))
    train, load_ = TrainConfig(lora_r=4, lora_targets="all-linear"), Load(64, 64)
    full, nf4 = (
        predict_memory(files.architecture, train, load_, place=Place("cuda", "bf16"), base=base)
        for base in ("full", "nf4")
    )
    predicted = nf4.evaluation - full.evaluation + 2 * files.architecture.linear_parameters
    body = Body(load(tiny_model(family), dtype=torch.bfloat16))
    with beside(body.causal):
        products = [product for layer in StaticModel(describe(body.core), body).products for product in layer]
        kept = [factor for product in products for factor in product.adapter]
        for layer in body.core.modules():
            kept += [] if (found := adapted(layer)) is None else [found.a, found.b]
    assert predicted == sum(factor.nbytes for factor in kept)


def test_who_does_not_take_it(tiny_model):
    """The kernels of a CPU, and a layer whose forward under the adapter is not its own."""
    model = load(tiny_model("llama"))
    core = Body(model).core
    with beside(model):
        assert describe(core).adapted and not kernels_take(describe(core))
        engine = Engine(model)
        answers(engine, [[5, 6, 7]], Decoding(3, (), greedy=True))
        assert engine.how.endswith("(this machine has no kernels for the model with an adapter beside its weights)")
    layer = core.layers[0].mlp.up_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, 2 * layer.weight)
    with beside(model):
        assert describe(core) is None
