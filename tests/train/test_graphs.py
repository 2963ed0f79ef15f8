"""Passes padded to shapes that many steps share, and captured: without a GPU, by a stand-in for CUDA's graphs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tell
from tell.config_sections import TrainConfig
from tell.train import packing
from tell.train.fast.cuda import Layout
from tell.train.fast.fused import unfuse_modules
from tell.train.graphs import MOST_GRAPHS, Buffers, PassGraphs, Shape, padded, static_pack
from tell.train.lora import add_lora
from tell.train.packing import RowTargets, TrainRow, pack, pack_rows
from tell.train.step import Body, StepRules, pass_loss, step_loss
from train.packed import Fetches, gradients, load, make_rows, unseen_varlen, varlen_plan, wake

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
        assert float((ours[name] - x).abs().max()) <= 2e-6 * largest, name


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
                tokens=shape.tokens + 256, positions=shape.positions + 256, longest_q=512, longest_k=512
            )
        assert shape.holds(need)
        buffers = Buffers(padded(host, layout, weights, shape), torch.device("cpu"))
        buffers.fill(padded(host, layout, weights, shape))
        results = []
        passes = (
            (pack(rows, share_prefix=True), weights),
            (
                static_pack(buffers.tensors, shape, find),
                buffers.tensors["weights"],
            ),
        )
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
def test_steps_through_graphs_equal_steps_without(bodies, sequences, soft, kept):
    """Each step's loss, rows and gradients, whether or not the gradients are dropped between steps; nothing fetched."""
    model, body = bodies["llama"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    replayed = PassGraphs(body, parameters, Remembering(), find=find)
    rules = StepRules(task_weight=2.0, micro_tokens=260, share_prefix=True)
    results = {}
    for graphs in (None, replayed):
        model.zero_grad()
        for i, rows in enumerate(steps_of(6)):
            rows = with_targets(rows) if soft else rows
            with Fetches() as fetches:
                out = step_loss(body, rows, rules, graphs=graphs)
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


def test_other_gradients_are_taken_over(bodies, sequences):
    """A gradient that was set between passes is added to, at the address that the graphs know."""
    model, body = bodies["llama"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    graphs, rules = PassGraphs(body, parameters, Remembering(), find=find), StepRules()
    (rows,) = steps_of(1)
    model.zero_grad()
    for _ in range(3):
        step_loss(body, rows, rules, graphs=graphs)
    thrice, addresses = gradients(model), [p.grad.data_ptr() for p in parameters]
    for p in parameters:
        p.grad = p.grad / 3
    step_loss(body, rows, rules, graphs=graphs)
    assert [p.grad.data_ptr() for p in parameters] == addresses
    assert_near(gradients(model), {name: grad * 2 / 3 for name, grad in thrice.items()})
    model.zero_grad()


def test_a_failed_capture_is_said_and_the_step_is_right(bodies, sequences):
    class Failing(Remembering):
        def capture(self, work):
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            except RuntimeError:
                raise RuntimeError("operation failed due to a previous error during capture") from None

    model, body = bodies["llama"]
    notes = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    graphs = PassGraphs(body, parameters, Failing(), notes.append, find=find)
    (rows,) = steps_of(1)
    found = []
    for _ in range(3):
        model.zero_grad()
        loss = step_loss(body, rows, StepRules(), graphs=graphs).loss
        found.append((loss, gradients(model)))
    assert notes == [
        "CUDA graphs: none, since capturing failed (RuntimeError: operation not permitted when stream is capturing)"
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[1][0] == found[2][0]
    assert_near(found[2][1], found[0][1])
    model.zero_grad()


def estimated_rows():
    """Rows of a task and of general instructions, by their texts: four characters a token, half of them trained."""
    root = Path(tell.__file__).parents[2]
    task = (root / "examples" / "support" / "train.jsonl").read_text().splitlines()
    general = (Path(tell.__file__).parent / "data" / "builtin" / "prompts.jsonl").read_text().splitlines()

    rng = np.random.default_rng(0)

    def rows(lines, anchor, task):
        for line in lines:
            size = sum(len(str(value)) for value in json.loads(line).values()) // 4 + 20 + anchor
            trained = np.arange(size) >= size - (size - anchor) // 2
            ids = rng.integers(0, 1000, size)
            ids[:anchor] = 7
            yield TrainRow(ids, trained, int(not task), task)

    return list(rows(task, 280, True)), list(rows(general, 0, False))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("task_rows", [1, 4, 16])
def test_few_graphs_serve_many_steps(task_rows, share, sequences, monkeypatch):
    """Steps of 16 rows of the support example among general ones."""
    rules, rng, waste = StepRules(share_prefix=share), np.random.default_rng(1), []
    task, general = estimated_rows()
    cuts = []

    def run(self, rows, weights, *, share_prefix):
        host = pack_rows(rows, share_prefix=share_prefix)
        layout = Layout.of(host.lengths, host.prefix, host.ahead)
        need = Shape.of(host, layout)
        shape = self._shape(need)
        entry = self._entry(shape, padded(host, layout, weights, shape))
        cuts.append(shape)
        self.passes += 1
        self.replayed += entry.used
        self.captured += entry.used and entry.replay is None
        entry.replay = print if entry.used else None
        entry.used = True
        waste.append(shape.cost / need.cost)
        return entry

    graphs = PassGraphs(body=type("B", (), {"device": torch.device("cpu")}), parameters=[], capturer=Remembering())
    for _ in range(200):
        drawn = [task[i] for i in rng.integers(0, len(task), task_rows)]
        drawn += [general[i] for i in rng.integers(0, len(general), 16 - task_rows)]
        for group in packing.split_packs(drawn, rules.micro_tokens, share_prefix=share):
            weights = rules.weights(group, torch.tensor(16.0))
            run(graphs, group, weights, share_prefix=share)
    print(graphs.summary(), len(set(cuts)), f"{np.mean(waste):.3f}")
    assert graphs.captured <= MOST_GRAPHS
    assert graphs.replayed >= 0.9 * graphs.passes
    assert np.mean(waste) < 1.15
