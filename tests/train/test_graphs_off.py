"""Which passes are not computed by graphs, and that it is said why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tell.config_sections import TrainConfig
from tell.kernels.quantised import QuantisedLinear
from tell.train import graphs as module
from tell.train import trainer as trainers
from tell.train.fast.base_weight import parameter_count
from tell.train.fast.fused import unfuse_modules
from tell.train.graphs import PassGraphs, graphs_for
from tell.train.lora import add_lora
from tell.train.recompute import recomputed_layers
from tell.train.step import Body, StepRules, step_loss
from tell.train.trainer import Trainer
from train.packed import assert_close, gradients, load, make_rows, unseen_varlen, wake
from train.test_graphs import Remembering, find, sequences  # noqa: F401  (a fixture)


def test_what_trains_through_graphs(tiny_model, monkeypatch):
    """Small models with flash attention; why a small one does not is said."""
    causal = load(tiny_model("llama"))
    monkeypatch.setattr(module, "CudaCapturer", lambda device: device)

    def made(device="cuda", size=1e8, level=0, refusal=None, flash=None):
        notes, layers = [], SimpleNamespace(level=level)
        monkeypatch.setattr(module, "flash_refusal", lambda model: flash)
        monkeypatch.setattr(module, "parameter_count", lambda model: size)
        weight = SimpleNamespace(device=torch.device(device))
        model = SimpleNamespace(
            config=causal.config,
            get_output_embeddings=lambda: SimpleNamespace(weight=weight),
        )
        return graphs_for(model, [], layers=layers, refusal=refusal, note=notes.append), notes

    graphs, notes = made()
    assert graphs.capturer == torch.device("cuda") and graphs.layers.level == 0 and notes == []
    assert made(device="cpu", refusal="no") == made(size=8e9, level=2) == (None, [])
    assert made(refusal="several") == (None, ["CUDA graphs: none (several)"])
    assert made(level=1) == (None, ["CUDA graphs: none (layers are recomputed on the way back)"])
    assert made(flash="the weights are float32") == (None, ["CUDA graphs: none (the weights are float32)"])


@pytest.mark.parametrize(
    ("noise", "processes", "why"),
    [
        (0.0, None, None),
        (5.0, None, "NEFTune draws noise by each row's length"),
        (0.0, object(), "several processes train together"),
    ],
)
def test_a_run_says_why_it_has_none(noise, processes, why, monkeypatch):
    told = []
    monkeypatch.setattr(trainers, "graphs_for", lambda model, parameters, **options: told.append(options))
    config, hooks, layers = SimpleNamespace(neftune_alpha=noise), SimpleNamespace(note=print), object()
    run = SimpleNamespace(config=config, processes=processes, hooks=hooks)
    assert Trainer._graphs(run, None, object.__new__(Body), {}, layers) is None
    assert told == [{"layers": layers, "refusal": why, "note": print}]


def test_packed_weights_count_as_those_of_the_matrix(tiny_model):
    model = load(tiny_model("llama"))
    whole = model.num_parameters()
    assert parameter_count(model) == whole
    for layer in model.model.layers:
        rows, columns = layer.mlp.down_proj.weight.shape
        packed = torch.zeros(rows * columns // 2, 1, dtype=torch.uint8)
        layer.mlp.down_proj = QuantisedLinear(packed, torch.ones(rows), None, (rows, columns))
    assert model.num_parameters() < whole == parameter_count(model)


@pytest.fixture
def trained(tiny_model):
    """A model on its own forwards, and what a step's loss and gradients are."""
    model = add_lora(load(tiny_model("llama")), TrainConfig(lora_dropout=0.0, lora_r=4), seed=1)
    wake(model)
    body = Body(model)
    unfuse_modules(model.get_base_model())
    rows = make_rows([30, 25, 300], prefix=10)  # two passes of different shapes

    def step(rules=StepRules(micro_tokens=60)):  # noqa: B008
        model.zero_grad()
        return step_loss(body, rows, rules).loss, gradients(model)

    return model, body, step


def made_graphs(model, notes, **options):
    return PassGraphs([p for p in model.parameters() if p.requires_grad], Remembering(), notes.append, **options)


def test_graphs_end_where_layers_are_recomputed(trained, sequences):  # noqa: F811
    """Memory ended, and the level rose: a captured pass could not save random states, nor give its memory."""
    model, body, step = trained
    expected, notes = step(), []
    with recomputed_layers(model.get_base_model()) as layers:
        body.graphs = graphs = made_graphs(model, notes, find=find, layers=layers)
        step()
        assert graphs.passes and notes == []
        layers.level, passes = 1, graphs.passes
        for _ in range(2):
            loss, grads = step()
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert_close(grads, expected[1])
    assert graphs.passes == passes and not graphs._entries
    assert notes == ["CUDA graphs: none from here on (layers are recomputed on the way back)"]


def test_a_layer_without_flash_attention_is_computed_without_graphs(trained, sequences):  # noqa: F811
    """Found out in a later pass of the step: gradients of the earlier ones stay."""
    model, body, step = trained
    expected, notes, calls = step(), [], []

    def some(query, value):
        calls.append(query)
        return unseen_varlen if len(calls) < 4 else None  # two layers in each pass

    body.graphs = made_graphs(model, notes, find=some)
    for _ in range(2):
        loss, grads = step()
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert_close(grads, expected[1])
    assert len(calls) == 4 and body.graphs.passes == 1
    assert notes == ["CUDA graphs: none from here on (flash attention does not compute LlamaAttention)"]
