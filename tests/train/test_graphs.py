"""Passes padded to shapes that many steps share, and captured: without a GPU, by a stand-in for CUDA's graphs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tell
import tiny
from tell.config_sections import TrainConfig
from tell.kernels.draws import draw_seed
from tell.mix.mixture import build
from tell.train import graphs as module
from tell.train import packing
from tell.train import trainer as trainers
from tell.train.fast.cuda import Layout, _torch_varlen
from tell.train.fast.fused import unfuse_modules
from tell.train.flat import FlatAdapters
from tell.train.graphs import MOST_GRAPHS, PassGraphs, graphs_for
from tell.train.lora import a_scales, add_lora
from tell.train.packing import RowTargets, TrainRow, pack, pack_rows
from tell.train.static_pass import Buffers, Shape, padded, static_pack
from tell.train.step import Body, StepRules, causal_of, pass_loss, step_loss
from tell.train.training_job import TrainingHooks, TrainingJob
from train.packed import Fetches, gradients, load, make_rows, make_table, unseen_varlen, varlen_plan, wake

CONFIG = TrainConfig(lora_dropout=0.0, lora_r=4)


def find(query, value):
    return unseen_varlen


class Remembering:
    """Captures by remembering the work: whatever it reads must be in the buffers when it is replayed."""

    def warm(self, work):
        work()

    def capture(self, work):
        return work


@pytest.fixture
def sequences(monkeypatch):
    """Packs as on a GPU."""
    monkeypatch.setattr(packing, "packed_plan", varlen_plan)
    monkeypatch.setattr(packing, "prefix_per_row", lambda device: True)


@pytest.fixture(scope="module")
def bodies(tiny_model) -> dict:
    """Families with grouped heads, with a window, and with norms on queries and keys; their own forwards."""
    out = {}
    for family in ("llama", "mistral", "qwen3"):
        model = add_lora(load(tiny_model(family)), CONFIG, seed=1)
        wake(model)
        body = Body(model)
        unfuse_modules(model.get_base_model())
        out[family] = model, body
    return out


def assert_near(ours, theirs):
    """Within rounding of the largest gradient; in a row of two tokens those of queries and keys are zero."""
    assert ours.keys() == theirs.keys()
    largest = max(float(x.abs().max()) for x in theirs.values())
    assert largest > 0
    for name, x in theirs.items():
        assert float((ours[name] - x).abs().max()) <= 1e-5 * largest, name


def with_targets(rows, every=2, choices=3):
    """Each second row is trained on distributions."""
    rng, out = np.random.default_rng(3), []
    for i, row in enumerate(rows):
        m = int(row.mask.sum())
        ids = np.argsort(rng.random((m, 300)), axis=1)[:, :choices].astype(np.int32)
        soft = RowTargets(ids, rng.dirichlet(np.ones(choices + 1), m).astype(np.float32))
        out.append(TrainRow(row.ids, row.mask, row.source, row.task, soft if i % every == 0 else None, 1.0 + i))
    return out


def mixed_rows(lengths, prefix, common, seed=0):
    """Rows that begin with ``common`` tokens, every other one, of the task, with ``prefix``."""
    task = range(0, len(lengths), 2)
    head = make_rows([prefix + 3], prefix=prefix, seed=seed)[0].ids[:prefix]
    rows = []
    for row in make_rows([n + prefix for n in lengths], seed=seed, task=task):
        row.ids[:common] = head[:common]
        if row.task:
            row.ids[:prefix] = head
        rows.append(row)
    return rows


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    prefix=st.sampled_from([(0, 0), (12, 12), (20, 9), (20, 0)]),
    family=st.sampled_from(["llama", "mistral", "qwen3"]),
    soft=st.booleans(),
    larger=st.booleans(),
)
def test_a_padded_pass_equals_its_own(bodies, lengths, prefix, family, soft, larger):
    """Loss, losses of the rows and gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "packed_plan", varlen_plan)
        patch.setattr(packing, "prefix_per_row", lambda device: True)
        model, body = bodies[family]
        rows = mixed_rows(lengths, *prefix)
        rows = with_targets(rows) if soft else rows
        rules = StepRules(task_weight=2.0)
        weights = rules.weights(rows, torch.tensor(rules.total(rows)))
        host = pack_rows(rows, share_prefix=True)
        layout = Layout.of(host.lengths, host.prefix, host.ahead)
        need = Shape.of(host, layout)
        shape = need.rounded()
        if larger:
            shape = shape._replace(
                tokens=shape.tokens + 256, positions=shape.positions + 256, longest_q=2048, longest_k=2048
            )
        assert shape.holds(need)
        buffers = Buffers(padded(host, layout, weights, shape), torch.device("cpu"))
        buffers.fill(padded(host, layout, weights, shape))
        results = []
        static = static_pack(buffers.tensors, shape, find), buffers.tensors["weights"]
        passes = ((pack(rows, share_prefix=True), weights), static)
        for batch, each in passes:
            model.zero_grad()
            loss, means = pass_loss(body, batch, each)
            loss.backward()
            results.append((float(loss.detach()), means[: len(rows)], gradients(model)))
    (loss, means, grads), (ours, our_means, our_grads) = results
    assert ours == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(our_means, means, rtol=1e-5, atol=1e-6)
    assert_near(our_grads, grads)


def steps_of(number, seed=0):
    """Steps of different rows; lengths differ less than shapes."""
    rng = np.random.default_rng(seed)
    return [mixed_rows(rng.integers(20, 60, 8).tolist(), 30, 10, seed=i) for i in range(number)]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_steps_through_graphs_equal_steps_without(bodies, sequences, soft, kept, monkeypatch):
    """Each step's loss, rows and gradients, whether or not the gradients are dropped between steps; nothing fetched."""
    model, body = bodies["llama"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    replayed = PassGraphs(parameters, Remembering(), find=find)
    rules = StepRules(task_weight=2.0, micro_tokens=260, share_prefix=True)
    results = {}
    for graphs in (None, replayed):
        model.zero_grad()
        monkeypatch.setattr(body, "graphs", graphs)
        for i, rows in enumerate(steps_of(6)):
            rows = with_targets(rows) if soft else rows
            with Fetches() as fetches:
                out = step_loss(body, rows, rules)
            assert fetches.names == []
            results.setdefault(i, []).append((out, gradients(model)))
            model.zero_grad(set_to_none=not kept)
    for (theirs, their_grads), (ours, our_grads) in results.values():
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5) and ours.tokens == theirs.tokens
        assert ours.rows == pytest.approx(theirs.rows, rel=1e-5) and (ours.source == theirs.source).all()
        assert_near(our_grads, their_grads)
    assert replayed.captured >= 1 and replayed.replayed > replayed.passes / 2
    assert replayed.summary().endswith(f"of {replayed.passes} passes replayed")
    model.zero_grad()


def test_other_gradients_are_taken_over(bodies, sequences, monkeypatch):
    """A gradient that was set between passes is added to, at the address that the graphs know."""
    model, body = bodies["llama"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    monkeypatch.setattr(body, "graphs", PassGraphs(parameters, Remembering(), find=find))
    rules = StepRules()
    (rows,) = steps_of(1)
    model.zero_grad()
    for _ in range(3):
        step_loss(body, rows, rules)
    thrice, addresses = gradients(model), [p.grad.data_ptr() for p in parameters]
    for p in parameters:
        p.grad = p.grad / 3
    step_loss(body, rows, rules)
    assert [p.grad.data_ptr() for p in parameters] == addresses
    assert_near(gradients(model), {name: grad * 2 / 3 for name, grad in thrice.items()})
    model.zero_grad()


def test_a_failed_capture_is_said_and_the_step_is_right(bodies, sequences, monkeypatch):
    class Failing(Remembering):
        def capture(self, work):
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            except RuntimeError:
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    model, body = bodies["llama"]
    notes = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    monkeypatch.setattr(body, "graphs", PassGraphs(parameters, Failing(), notes.append, find=find))
    (rows,) = steps_of(1)
    found = []
    for _ in range(3):
        model.zero_grad()
        loss = step_loss(body, rows, StepRules()).loss
        found.append((loss, gradients(model)))
    assert notes == [
        "CUDA graphs: none from here on (capturing failed, RuntimeError: operation not permitted when stream is "
        "capturing)"
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[1][0] == found[2][0]
    assert_near(found[2][1], found[0][1])
    model.zero_grad()


def test_where_memory_ends_the_graphs_go_first(bodies, sequences, monkeypatch):
    class Full(Remembering):
        def warm(self, work):
            raise torch.OutOfMemoryError("out of memory")

    model, body = bodies["llama"]
    notes = []
    monkeypatch.setattr(body, "graphs", PassGraphs(list(model.parameters()), Full(), notes.append, find=find))
    (rows,) = steps_of(1)
    with pytest.raises(torch.OutOfMemoryError):
        step_loss(body, rows, StepRules())
    assert notes == ["CUDA graphs: none from here on (memory ended)"]
    assert step_loss(body, rows, StepRules(), backward=False).loss == step_loss(body, rows, StepRules()).loss
    model.zero_grad()


class Mixing(TorchDispatchMode):
    """Names operations on a tensor of the CPU, other than a scalar, next to one of the device: a hidden copy."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.dim()]
        if len({x.device.type for x in tensors}) > 1:
            self.names.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "gemma2"])
def test_a_captured_pass_reads_and_sends_nothing(family, soft, tiny_model):
    """On the meta device, which has no data to read, with torch's own operations of flash attention."""
    model = add_lora(load(tiny_model(family)), TrainConfig(lora_dropout=0.1, lora_r=4), seed=1)
    body = Body(model)
    unfuse_modules(model.get_base_model())
    model.to("meta")
    body.head, body.device = model.get_output_embeddings().weight, torch.device("meta")
    rows = mixed_rows([20, 30, 40, 25], 20, 9)
    rows = with_targets(rows) if soft else rows
    host = pack_rows(rows, share_prefix=True)
    layout = Layout.of(host.lengths, host.prefix, host.ahead)
    shape = Shape.of(host, layout).rounded()
    buffers = Buffers(padded(host, layout, torch.ones(len(host.targets)), shape), torch.device("meta"))
    batch = static_pack(buffers.tensors, shape, lambda query, value: _torch_varlen())
    with Mixing() as mixing:
        loss, means = pass_loss(body, batch, buffers.tensors["weights"])
        loss.backward()
    assert mixing.names == []
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad) and means.shape == (shape.sequences,)


def estimated_rows(soft):
    """Rows of a task and of general instructions, by their texts: four characters a token, half of them trained."""
    root = Path(__file__).parents[2]  # not the package: it may be installed elsewhere
    task = (root / "examples" / "support" / "train.jsonl").read_text().splitlines()
    general = (Path(tell.__file__).parent / "data" / "builtin" / "prompts.jsonl").read_text().splitlines()

    rng = np.random.default_rng(0)

    def rows(lines, anchor, task):
        for line in lines:
            size = sum(len(str(value)) for value in json.loads(line).values()) // 4 + 20 + anchor
            trained = np.arange(size) >= size - (size - anchor) // 2
            ids = rng.integers(0, 1000, size)
            ids[:anchor] = 7
            n = trained.sum()
            targets = RowTargets(np.zeros((n, 2), np.int32), np.ones((n, 3), np.float32)) if soft and not task else None
            yield TrainRow(ids, trained, int(not task), task, targets)

    return list(rows(task, 280, True)), list(rows(general, 0, False))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("task_rows", [(1, 3), (3, 7), (16, 16)])
def test_few_graphs_serve_many_steps(task_rows, share, soft, sequences, monkeypatch):
    """Steps of 16 rows, some of the support example among general ones; only the passes themselves are left out."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    graphs = PassGraphs([parameter], Remembering(), find=find)
    body = SimpleNamespace(device=torch.device("cpu"), graphs=graphs)
    computed = []

    def no_pass(body, batch, weights):
        computed.append(len(batch.ids))
        return parameter.sum(), torch.zeros(len(batch.trained))

    monkeypatch.setattr(module, "pass_loss", no_pass)
    rules, rng, real = StepRules(share_prefix=share), np.random.default_rng(1), 0
    task, general = estimated_rows(soft)
    for _ in range(200):
        count = int(rng.integers(task_rows[0], task_rows[1] + 1))
        drawn = [task[i] for i in rng.integers(0, len(task), count)]
        drawn += [general[i] for i in rng.integers(0, len(general), 16 - count)]
        packs = packing.split_packs(drawn, rules.micro_tokens, share_prefix=share)
        real += sum(len(pack_rows(group, share_prefix=share).ids) for group in packs)
        assert step_loss(body, drawn, rules).tokens == sum(len(row.ids) for row in drawn)
    waste = sum(computed) / real - 1
    print(f"{graphs.summary()}, {waste:.1%} of the tokens are dead")
    assert graphs.captured <= (16 if soft else MOST_GRAPHS)
    assert graphs.replayed >= 0.9 * graphs.passes
    assert waste < 0.15


def test_training_through_graphs_ends_with_the_same_adapter(tiny_model, tmp_path, sequences, monkeypatch):
    """The whole loop, with its optimiser and its way of dropping gradients; what was replayed is said."""

    class Unfused(Body):
        def __init__(self, model):
            super().__init__(model)
            unfuse_modules(causal_of(model))

    monkeypatch.setattr(trainers, "Body", Unfused)
    config = TrainConfig(batch_size=4, learning_rate=1e-3, lora_r=4, lora_dropout=0.0, checkpoint_every=0, report_to=())
    rows = make_rows([30 + i for i in range(24)], prefix=12, task=range(24))
    tables = {"task": make_table(rows, "task")}
    mixture = build(tables, general=None, repeat=2, ordering="shuffle", seed=0)
    found = {}
    for name in ("without", "with"):
        job, notes = TrainingJob(tables, mixture, config, 7, tmp_path / name, tmp_path / f"{name}.jsonl"), []
        if name == "with":
            made = lambda model, parameters, **rest: PassGraphs(parameters, Remembering(), rest["note"], find=find)  # noqa: E731
            monkeypatch.setattr(trainers, "graphs_for", made)
        trainers.Trainer(load(tiny_model("llama")), job, hooks=TrainingHooks(note=notes.append)).run()
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert notes == ["CUDA graphs: 1 captured, 92% of 12 passes replayed"]
    for name, x in found["without"].items():  # AdamW divides by small second moments
        assert (found["with"][name] - x).norm() <= 1e-2 * x.norm(), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("soft", [False, True])
def test_graphs_on_a_gpu(tiny_model, soft):
    """The same steps in bf16 with and without graphs; replays drop what the first pass of the same seed does."""
    results, limits = [], {"layers": SimpleNamespace(level=0), "refusal": None}
    for used in (False, True):
        model = add_lora(load(tiny_model("llama"), dtype=torch.bfloat16).to("cuda"), CONFIG, seed=1)
        wake(model)
        body, parameters, notes = Body(model), [p for p in model.parameters() if p.requires_grad], []
        body.graphs = graphs_for(model, parameters, **limits, note=notes.append) if used else None
        for i, rows in enumerate(steps_of(6)):
            rows = with_targets(rows) if soft else rows
            out = step_loss(body, rows, StepRules(task_weight=2.0, share_prefix=True))
            results.append((i, out, gradients(model)))
            model.zero_grad()
        assert notes == [] and (not used or body.graphs.replayed)
    for (_, theirs, their_grads), (_, ours, our_grads) in zip(results[:6], results[6:], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-2)
        a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (our_grads, their_grads))
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99

    half = CONFIG.model_copy(update={"lora_dropout": 0.5})
    dropping = add_lora(load(tiny_model("llama"), dtype=torch.bfloat16).to("cuda"), half, seed=1)
    wake(dropping)
    body = Body(dropping)
    named = {name: p for name, p in dropping.named_parameters() if p.requires_grad}
    FlatAdapters(named, a_scales(dropping), torch.bfloat16)
    body.graphs = graphs_for(dropping, named.values(), **limits, note=print)
    (rows,), losses = steps_of(1), []
    for seed in (1, 1, 1, 2):
        torch.manual_seed(seed)
        draw_seed(body.device)
        losses.append(step_loss(body, rows, StepRules()).loss)
    assert body.graphs.replayed == 3 and losses[1] == losses[2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[3] != pytest.approx(losses[1], rel=1e-3)
