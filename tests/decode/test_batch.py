"""Both ways of decoding give the same states, tokens and draws; what the kernels cannot take falls back."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tell.decode.batch import KernelBatch, Packed, PlainBatch
from tell.decode.engine import TOLERANCE, Engine
from tell.decode.engine_rows import Answer, Row
from tell.decode.layers import Product, describe
from tell.decode.sampler import Decoding, choose
from tell.kernels import decode_ops as c
from tell.kernels import reason
from tell.train.step import Body
from train.packed import Fetches, load

needs_kernels = pytest.mark.skipif(c.kernels(torch.float32) is None, reason=f"no kernels: {reason()}")
DTYPES = (torch.float32, torch.bfloat16)


def random_rows(lengths, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(10, 300, length).tolist() for length in lengths]


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_states_of_both_ways(family, dtype, tiny_model, monkeypatch):
    """Rows beyond the window of 32, a prefix longer than it, passes that cut rows, rows that change places."""
    monkeypatch.setattr("tell.decode.batch.PREFILL_TOKENS", 50)
    body = Body(load(tiny_model(family), dtype=dtype))
    packed = Packed(describe(body.core), body)
    decoding = Decoding(4, ())
    for length in (0, 7, 150):
        prefix = random_rows([length])[0] if length else []
        rows = random_rows((45, 1, 17, 33, 130), seed=1)
        states = []
        for batch in (
            KernelBatch(packed, decoding, 6, 140, prefix),
            PlainBatch(body, decoding, 6, 140, prefix, torch.device("cpu")),
        ):
            out = [batch.prefill(rows[:4], 0), batch.prefill(rows[4:], 4)]
            lengths = [len(row) for row in rows]
            out.append(batch.decode(lengths, [5, 6, 7, 8, 9]))
            batch.move([4], [1], lengths[4] + 1)  # row 1 is finished
            out.append(batch.decode([46, 131, 18, 34], [1, 2, 3, 4]))
            out.append(batch.prefill([[3, 4, 5]], 4))  # a new row in the slot that came free
            out.append(batch.decode([47, 132, 19, 35, 3], [1, 2, 3, 4, 5]))
            states.append(torch.cat(out).float())
        error = (states[0] - states[1]).norm(dim=1) / states[1].norm(dim=1)
        assert error.max() < (TOLERANCE[dtype] if dtype == torch.bfloat16 else 1e-5), (length, error)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    seed=st.integers(0, 9999),
    vocabulary=st.integers(1, 700),
    top_k=st.integers(1, 60),
    top_p=st.sampled_from([0.05, 0.7, 0.95, 1.0]),
    temperature=st.sampled_from([0.05, 0.3, 1.0, 3.0]),
    penalty=st.sampled_from([1.0, 1.05, 1.4]),
    greedy=st.booleans(),
    banned=st.booleans(),
)
@settings(max_examples=60)
def test_sampler_equals_torch(dtype, seed, vocabulary, top_k, top_p, temperature, penalty, greedy, banned):
    generator = torch.Generator().manual_seed(seed)
    n = 9
    # distinct in bf16 as well: among equals torch's top-k takes any
    values = torch.linspace(-5, 5, vocabulary)[torch.argsort(torch.rand(n, vocabulary, generator=generator), dim=1)]
    if dtype == torch.bfloat16 or penalty != 1:
        top_k = 1 if top_k > 20 else top_k
        values = torch.randint(-120, 120, (n, 1), generator=generator) / 64 + values * 3
    logits = values.to(dtype)
    seen = torch.rand(12, vocabulary, generator=generator) < 0.3
    slot = torch.randperm(12, generator=generator)[:n].int()
    draws = torch.rand(n, generator=generator)
    banned_ids = (0, vocabulary // 2) if banned and vocabulary > 80 else ()
    rule = Decoding(1, (), greedy, temperature, top_k, top_p, penalty, banned_ids=banned_ids)
    ids = torch.tensor(banned_ids, dtype=torch.int64)
    arguments = c.RuleArguments(
        vocabulary, top_k, len(ids), greedy, temperature, top_p, penalty, 0.0, ids.data_ptr() if len(ids) else None
    )
    flags = seen.to(torch.uint8)
    chosen = c.kernels(dtype).sample(c.by_reference(arguments), logits, slot, flags, draws)
    expected = choose(logits.float(), seen[slot.long()], draws, rule)
    penalised = torch.where(logits > 0, logits.float() / penalty, logits.float() * penalty)
    after = torch.where(seen[slot.long()], penalised, logits.float())
    same = after.gather(1, chosen[:, None]) == after.gather(1, expected[:, None])  # equals may stand for each other
    assert same.all()
    marked = seen.to(torch.uint8)
    marked[slot.long(), chosen] = 1
    assert torch.equal(flags, marked)


@needs_kernels
def test_ties_go_to_the_lower_token():
    logits = torch.zeros(2, 100, dtype=torch.bfloat16)
    logits[0, [40, 70]] = 1
    seen, slot, draws = torch.zeros(2, 100, dtype=torch.uint8), torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2)
    for greedy in (True, False):
        rule = c.RuleArguments(100, 5, 0, greedy, 1.0, 1.0, 1.0, 0.0, None)
        chosen = c.kernels(torch.bfloat16).sample(c.by_reference(rule), logits, slot, seen, draws)
        assert chosen.tolist() == [40, 0]


@needs_kernels
def test_banned_tokens_that_the_model_lacks():
    """Each row's numbers lie beside other memory: what is banned beyond them must not be written there."""
    logits = torch.arange(100.0).expand(2, 100).contiguous()
    seen, slot, draws = torch.zeros(2, 100, dtype=torch.uint8), torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2)
    banned = torch.tensor([-(1 << 40), 99, 100, 1 << 40])
    rule = c.RuleArguments(100, 5, len(banned), True, 1.0, 1.0, 1.0, 0.0, banned.data_ptr())
    assert c.kernels(torch.float32).sample(c.by_reference(rule), logits, slot, seen, draws).tolist() == [98, 98]


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_sampled_answers_of_both_ways(family, tiny_model):
    model = load(tiny_model(family))
    prompts = [random_rows([9])[0] + row for row in random_rows((4, 30, 7, 7, 50, 2), seed=3)]
    decoding = Decoding(16, (3, 50, 51), temperature=1.5, top_k=30, top_p=0.95, seed=5, batch_size=4)
    fast, plain = Engine(model), Engine(model, fast=False)
    assert fast.generate(prompts, decoding) == plain.generate(prompts, decoding)
    assert fast.trusted is True and plain.trusted is None


@needs_kernels
def test_what_the_kernels_cannot_take_is_decoded_plainly(tiny_model):
    model = load(tiny_model("llama"))
    core = Body(model).core
    assert describe(core) is not None
    for change in ({"model_type": "other"}, {"hidden_act": "relu"}, {"rope_parameters": {"rope_type": "dynamic"}}):
        other = copy.copy(core)
        other.config = copy.deepcopy(core.config)
        for name, value in change.items():
            setattr(other.config, name, value)
        assert describe(other) is None, change
    assert describe(copy.deepcopy(core).half()) is None


@needs_kernels
def test_a_model_that_computes_otherwise_is_found_out(tiny_model):
    """A changed forward in a known class: the kernels' answers differ, so they are not used."""
    model = load(tiny_model("llama"))
    decoding = Decoding(5, (), greedy=True)
    first = Engine(model).generate([[5, 6, 7]], decoding)
    for layer in model.model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: 0.5 * forward(x)
    engine = Engine(model)
    got = engine.generate([[5, 6, 7]], decoding)
    assert engine.trusted is False and got == Engine(model, fast=False).generate([[5, 6, 7]], decoding) and got != first


@torch.inference_mode()
def test_a_step_waits_for_no_gpu_and_prefill_has_no_loop_of_rows(tiny_model):
    body, counts = Body(load(tiny_model("qwen3"))), []
    for rows in (2, 12):
        batch = PlainBatch(body, Decoding(4, (), banned_ids=(7,)), rows, 20, [5, 6, 7, 8], torch.device("cpu"))
        with Fetches() as fetches:
            states = batch.prefill([[3, 4, 5]] * rows, 0)
            batch.see(0, [[3, 4, 5]] * rows)
            batch.decode([3] * rows, [9] * rows)
            batch.move([rows - 1], [0], 4)
        assert fetches.names == []
        counts.append(fetches.operations)
        assert batch.seen.nonzero().tolist() == [[row, token] for row in range(rows) for token in (3, 4, 5)]
        assert 7 not in batch.choose(states, range(rows), torch.rand(rows))
    assert counts[1] - counts[0] <= 10  # positions are counted row by row, once, on the CPU


@given(n=st.integers(1, 12), data=st.data())
def test_rows_that_go_on_fill_the_places_of_finished_ones(n, data):
    class Places:
        def __init__(self) -> None:
            self.rows = list(range(n))

        def move(self, sources, targets, length):
            assert not set(sources) & set(targets) and length == max(len(active[s].prompt) for s in sources)
            for source, target in zip(sources, targets, strict=True):
                self.rows[target] = self.rows[source]

    finished = sorted(data.draw(st.sets(st.integers(0, n - 1))))
    ended: list[int] = []
    rows = [Row([0] * (i + 1), 1, np.zeros(1), Answer(ids=[])) for i in range(n)]
    for i, row in enumerate(rows):
        row.on_end = lambda answer, i=i: ended.append(i)
    active, batch = list(rows), Places()
    Engine._retire(active, finished, batch)
    assert sorted(map(rows.index, active)) == sorted(set(range(n)) - set(finished)) and ended == finished
    assert [rows.index(row) for row in active] == batch.rows[: len(active)]


def test_limits_of_single_rows(tiny_model):
    model = load(tiny_model("qwen2"))
    prompts = random_rows((4, 9, 2))
    decoding = Decoding(12, (), greedy=True)
    full = Engine(model).generate(prompts, decoding)
    for fast in (True, False):
        got = Engine(model, fast=fast).generate(prompts, decoding, limits=[3, 20, 1])
        assert [len(answer.ids) for answer in got] == [3, 20, 1]
        assert all(a.ids[:12] == b.ids[: len(a.ids)] for a, b in zip(got, full, strict=True))
    for wrong in ([3, 4], [3, 0, 1]):
        with pytest.raises(ValueError, match="limits for 3 prompts"):
            Engine(model).generate(prompts, dataclasses.replace(decoding), limits=wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_layers_side_by_side(dtype):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(48, o, bias=b).to(dtype).requires_grad_(False) for o, b in ((32, True), (16, False))]
    x = torch.randn(5, 48).to(dtype)
    got = Product(*((m.weight, m.bias) for m in layers))(x)
    torch.testing.assert_close(got, torch.cat([m(x) for m in layers], dim=1))


@needs_kernels
@given(
    rows=st.integers(1, 70),
    half=st.integers(1, 40),
    outputs=st.integers(1, 150),
    bias=st.booleans(),
    seed=st.integers(),
)
@settings(max_examples=60)
def test_packed_weight(rows, half, outputs, bias, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    x, weight = (torch.randn(n, 2 * half, generator=generator).bfloat16() for n in (rows, outputs))
    add = torch.randn(outputs, generator=generator).bfloat16() if bias else None
    if not c.packs_weights(weight):
        pytest.skip("this processor leaves products to the library")
    exact = x.double() @ weight.double().t() + (0 if add is None else add.double())
    got = c.PackedWeight(weight, add)(x)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-4)


@needs_kernels
def test_token_beyond_the_vocabulary(tiny_model):
    for token in (100_000, -1):
        with pytest.raises(IndexError):
            Engine(load(tiny_model("llama"))).generate([[5, token]], Decoding(2, (), greedy=True))
