"""A batch over a static cache decodes what the others decode, by steps that are recorded once and repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from decode.static import Operations, static_engine, storages
from decode.test_engine import answers, check_arrivals, prompts_of, reference
from decode.test_grammar import SCHEMA, grammar
from decode.test_guide import PROMPTS, label_guides
from tell.decode import static_batch
from tell.decode.batch import PlainBatch
from tell.decode.engine import TOLERANCE, Engine
from tell.decode.engine_rows import Request
from tell.decode.guide import Vocabulary
from tell.decode.kv_cache import PrefillPlan, Store
from tell.decode.layers import describe
from tell.decode.sampler import Decoding
from tell.decode.static_batch import StaticBatch
from tell.decode.static_model import StaticModel
from tell.decode.step_graphs import GraphRecorder, Unrecorded, recorder
from tell.rows.template import ChatTokenizer
from tell.train import capture
from tell.train.attention import Rule
from tell.train.device import Fetch
from tell.train.step import Body
from train.packed import Fetches, load
from train.test_cuda import reference_varlen

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch):
    """Small sizes, so that a few rows and tokens pass several of them."""
    monkeypatch.setattr(static_batch, "SHORTEST", 8)
    monkeypatch.setattr(static_batch, "ROWS", (1, 2, 4))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_equals_transformers(family, tiny_model):
    """Rows end at different times, and beyond the sliding window of 32; new ones take their places."""
    plain = load(tiny_model(family))
    engine, tape = static_engine(load(tiny_model(family)))
    for prefix in (0, 13, 40):
        prompts = prompts_of((3, 45, 20, 1, 33, 7, 2), prefix=prefix)
        free = Decoding(22, (), greedy=True, repetition_penalty=1.05)
        written = answers(engine, prompts, free)
        stops = (written[0][0][5], written[1][0][20], written[2][0][0])
        decoding = dataclasses.replace(free, stop_ids=stops)
        expected = reference(plain, prompts, decoding)
        assert answers(engine, prompts, decoding, batch_size=3) == expected
    assert engine.trusted is True and tape.repeats > 5 * tape.records > 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sampled_answers_equal_those_of_transformers_layers(family, tiny_model):
    """The same seeds draw the same tokens, chosen by the step itself or, where top-p alone limits them, after it."""
    model = load(tiny_model(family))
    (engine, tape), plain = static_engine(model), Engine(model, fast=False)
    prompts = prompts_of((4, 30, 7, 12, 2), prefix=10)
    first = Decoding(12, (3, 50, 51), temperature=1.5, top_k=30, top_p=0.95, seed=5, batch_size=2, banned_ids=(7, 8))
    for changes in ({}, {"seed": 6, "repetition_penalty": 1.0}, {"top_k": 0, "top_p": 1.0}, {"top_k": 0}):
        expected = answers(plain, prompts, first, **changes)
        assert answers(engine, prompts, first, **changes) == expected
    assert tape.repeats


@pytest.mark.parametrize("greedy", [True, False])
def test_requests_that_arrive_while_others_are_answered(greedy, tiny_model):
    model = load(tiny_model("gemma2"))
    (engine, _), plain = static_engine(model), Engine(model, fast=False)
    check_arrivals(engine, plain, [14, 6, 12, 20, 9, 5], greedy=greedy)


def test_who_needs_the_host_does_not_join_steps_that_do_without(tiny_model):
    engine, _ = static_engine(load(tiny_model("llama")))
    (first, second), asked = prompts_of((5, 9)), []

    def arrivals(free, fits):
        for mask in (None, object()):
            request = Request(second, 3, 1, lambda token: None, lambda answer: None, mask=mask)
            asked.append((mask is None, fits(request)))
        return []

    engine.serve(
        [Request(first, 3, 1, lambda token: None, lambda answer: None)],
        Decoding(1, (), greedy=True, batch_size=2),
        arrivals,
    )
    assert asked and all(free == fits for free, fits in asked)


def test_masks_and_guides(tiny_model):
    """Their rows wait for each token; tokens that must follow are fed in one pass."""
    folder = tiny_model("llama")
    model, chat = load(folder), ChatTokenizer(folder)
    made, prompts, written = grammar(chat, SCHEMA), prompts_of((4, 30, 7)), []
    decoding = Decoding(60, chat.stop_ids, greedy=True, batch_size=2)
    words = Vocabulary(chat)
    (engine, tape), plain = static_engine(model), Engine(model, fast=False)
    for one in (engine, plain):
        masks = [made.mask(), None, made.mask()]
        written.append(one.generate(prompts, decoding, masks=masks))
        guides = label_guides(words, chat, range(len(PROMPTS)))
        written.append(one.generate(PROMPTS, decoding, guides=guides))
    assert written[:2] == written[2:] and tape.repeats


def test_tokens_are_looked_at_one_step_late(tiny_model, monkeypatch):
    """The host reads what the step before chose while the next is under way; a token after the end is dropped."""
    engine, _ = static_engine(load(tiny_model("qwen2")))
    prompts = prompts_of((5, 9, 4), prefix=6)
    free = Decoding(12, (), greedy=True, batch_size=3)
    whole = answers(engine, prompts, free)
    events = []
    fetched, stepped = Fetch.array, StaticBatch.step
    monkeypatch.setattr(Fetch, "array", lambda self: events.append("read") or fetched(self))
    monkeypatch.setattr(StaticBatch, "step", lambda self, n, longest: events.append(n) or stepped(self, n, longest))
    assert answers(engine, prompts, free) == whole
    assert events == [3, *["read", 3] * 10, "read", "read"]  # no step too many where the limit ends a row
    stop = whole[1][0][4]
    events.clear()
    heard, moves = [], []
    got = engine.generate(
        prompts,
        dataclasses.replace(free, stop_ids=(stop,)),
        on_token=lambda row, token: heard.append((row, token)),
        progress=lambda new, further: moves.append((new, further)),
    )
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids, _ in whole]
    assert [answer.ids for answer in got] == expected and len(expected[1]) <= 4
    assert [[t for r, t in heard if r == row] for row in range(3)] == expected
    assert sum(further for _, further in moves) == pytest.approx(3) and min(further for _, further in moves) > 0
    assert sum(new for new, _ in moves) == sum(len(answer.ids) + (answer.finish == "stop") for answer in got)


@torch.inference_mode()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_states(family, device, tiny_model):
    """In every number format, joined weights or not: those of transformers' layers, within rounding."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        body = Body(load(tiny_model(family), dtype=dtype).to(device))
        for join in (True, False):
            model = StaticModel(describe(body.core), body, join=join)
            prefix, *rows = prompts_of((45, 45, 1, 17), seed=1)
            states = []
            for batch in (
                StaticBatch(model, Decoding(4, ()), 6, 75, prefix, recorder(torch.device(device))),
                PlainBatch(body, Decoding(4, ()), 6, 75, prefix, torch.device(device)),
            ):
                found = [batch.prefill(rows, 0), batch.decode([45, 1, 17], [5, 6, 7])]
                batch.move([2], [0], 18)
                found.append(batch.decode([18, 2], [1, 2]))
                found += [batch.prefill([[3, 4, 5]], 2), batch.decode([19, 3, 3], [1, 2, 3])]
                states.append(torch.cat(found).float())
            error = (states[0] - states[1]).norm(dim=1) / states[1].norm(dim=1)
            assert error.max() < (1e-5 if dtype == torch.float32 else TOLERANCE[dtype]), (dtype, join, error)


@torch.inference_mode()
@pytest.mark.parametrize(("family", "most"), [("llama", 24), ("qwen3", 28), ("gemma2", 39)])
def test_a_step_reads_nothing_on_the_host_and_launches_little(family, most, tiny_model):
    """Launches of one token step for all rows, in each layer; transformers' layers make 86."""
    body = Body(load(tiny_model(family), dtype=torch.bfloat16))
    model, launches = StaticModel(describe(body.core), body), []
    batch = StaticBatch(model, Decoding(9, (), banned_ids=(5,)), 4, 40, [5, 6, 7, 8], Unrecorded())
    batch.start(batch.prefill([[3, 4, 5], [9, 9], [8]], 0), 0, [3, 2, 1], [np.zeros(9)] * 3)
    batch.step(3, 4)
    layers = len(model.products)
    for _ in range(2):
        with Fetches() as fetches, Operations() as operations:
            batch.step(3, 4)
        assert fetches.names == []
        launches.append(operations.launches())
        model.description.layers.pop()
    each = launches[0] - launches[1]
    other = launches[0] - layers * each
    print(f"{family}: {each} launches in each layer, {other} besides")
    assert each <= most and other <= 48


@torch.inference_mode()
def test_no_number_is_sent_in_a_step(tiny_model):
    """Tensors made on the host and moved would be copied from memory that a recorded step no longer has."""
    body = Body(load(tiny_model("gemma2")))
    for decoding in (Decoding(9, (), banned_ids=(5,)), Decoding(9, (), greedy=True), Decoding(9, (), top_k=0, top_p=1)):
        batch = StaticBatch(StaticModel(describe(body.core), body), decoding, 2, 40, [5, 6, 7], Unrecorded())
        batch.start(batch.prefill([[3], [4]], 0), 0, [1, 1], [np.zeros(9)] * 2)
        with Operations() as operations:
            batch.step(2, 2)
        made = {str(func) for func, args, kwargs, _ in operations.made if not storages((args, kwargs))}
        made |= {str(func) for func, *_ in operations.made if "scalar_tensor" in str(func) or "lift" in str(func)}
        assert made <= {"aten.empty.memory_format", "aten.new_empty.default"}, made


def test_a_batch_is_kept_while_weights_are_fixed(tiny_model):
    engine, tape = static_engine(load(tiny_model("llama")))
    prompts, decoding = prompts_of((5, 9), prefix=4), Decoding(9, (), greedy=True)
    first = answers(engine, prompts, decoding)
    with engine.fixed_weights():
        assert answers(engine, prompts, decoding) == first
        assert answers(engine, prompts, decoding) == first
        records = tape.records
        assert answers(engine, prompts, decoding, seed=3, max_new_tokens=9) == first and tape.records == records
        assert answers(engine, prompts_of((5, 9), prefix=4, seed=1), decoding) != first and tape.records > records
    with torch.no_grad():
        engine.model.lm_head.weight.neg_()
    changed = answers(engine, prompts, decoding)
    assert changed != first and changed == answers(Engine(engine.model, fast=False), prompts, decoding)


def test_what_has_no_static_form_is_decoded_by_its_own_layers(tiny_model):
    """Hooks and other forwards: said once, and the answers are the model's."""
    model = load(tiny_model("llama"))
    prompts, decoding = prompts_of((5, 9)), Decoding(5, (), greedy=True)
    engine, tape = static_engine(model)
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, x, out: out * 0.5)
    with pytest.warns(UserWarning, match="decoded by transformers' layers, which is slower: the model is of a family"):
        got = answers(engine, prompts, decoding)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answers(engine, prompts, decoding) == got == answers(Engine(model, fast=False), prompts, decoding)
    assert engine.how.startswith("transformers' layers (the model is of a family, or has layers (other forwards")
    handle.remove()
    assert not tape.runs and answers(engine, prompts, decoding) != got and tape.runs
    assert engine.how == "static cache, CUDA graphs"
    for layer in model.model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: 0.5 * forward(x)
    engine, _ = static_engine(model)
    with pytest.warns(UserWarning, match="the faster implementation differs on this model"):
        got = answers(engine, prompts, decoding)
    assert engine.trusted is False and got == answers(Engine(model, fast=False), prompts, decoding)
    assert engine.how == "transformers' layers (the faster implementation differs on this model)"


def test_what_a_torch_lacks_is_said(tiny_model, monkeypatch):
    def step(self, *key):
        raise NotImplementedError("no such kernel\nhere")

    monkeypatch.setattr(StaticBatch, "_step", step)
    model = load(tiny_model("llama"))
    prompts, decoding = prompts_of((5, 9)), Decoding(5, (), greedy=True)
    engine, _ = static_engine(model)
    with pytest.warns(UserWarning, match=r"the faster implementation fails \(no such kernel\)"):
        got = answers(engine, prompts, decoding)
    assert got == answers(Engine(model, fast=False), prompts, decoding)


@pytest.mark.parametrize("where", ["begin", "step"])
def test_a_step_that_cannot_be_recorded_is_run(where, tiny_model, monkeypatch):
    recording, freed = [], []

    class Graph:
        def replay(self):
            raise AssertionError("never recorded")

        def capture_begin(self, pool, capture_error_mode):
            assert pool == (0, 7) and capture_error_mode == "thread_local"
            if where == "begin":
                raise RuntimeError("operation not permitted\nwhile capturing")
            recording.append(True)

        def capture_end(self):
            recording.clear()
            raise RuntimeError("capture failed due to a previous error")

    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Stream)

    def step(self, *key):
        if recording:
            raise RuntimeError("operation not permitted\nwhile capturing")
        whole(self, *key)

    whole = StaticBatch._step
    monkeypatch.setattr(StaticBatch, "_step", step)
    monkeypatch.setattr(capture.CudaCapturer, "_recover", lambda self, graph: freed.append(True))
    monkeypatch.setattr(capture, "side_stream", lambda device: Stream())
    for name, value in {
        "graph_pool_handle": lambda: (0, 7),
        "current_device": lambda: 0,
        "current_stream": lambda device: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    engine = Engine(load(tiny_model("llama")))
    engine.static, engine.recorder = True, GraphRecorder
    prompts, decoding = prompts_of((5, 9)), Decoding(9, (), greedy=True)
    with pytest.warns(UserWarning, match=r"cannot be recorded \(operation not permitted\)"):
        got = answers(engine, prompts, decoding)
    assert got == answers(Engine(engine.model, fast=False), prompts, decoding) and freed
    assert engine.how == "static cache, CUDA graphs failed (operation not permitted)"


def test_sizes_of_recorded_steps(monkeypatch):
    monkeypatch.undo()
    lengths = [static_batch.rounded_length(n) for n in range(1, 5001)]
    assert sorted(set(lengths)) == [128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(n <= size for n, size in enumerate(lengths, 1))
    rows = [static_batch.rounded_rows(n, 200) for n in range(1, 201)]
    assert sorted(set(rows)) == [1, 4, 16, 32, 64, 128, 192, 200] and all(n <= size for n, size in enumerate(rows, 1))


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    prefix=st.integers(0, 12),
    window=st.none() | st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_prefill_by_sequences_of_any_length(lengths, prefix, window, seed):
    """Flash attention's arguments, by its definition, against padded blocks."""
    generator, rule, results = torch.Generator().manual_seed(seed), Rule(0.3, window, None), []
    ahead = [torch.randn(1, 2, prefix, 8, generator=generator) for _ in range(2)]
    new = [torch.randn(1, heads, sum(lengths), 8, generator=generator) for heads in (4, 2, 2)]
    for found in (lambda q, v: reference_varlen, lambda q, v: None):
        store = Store(len(lengths), 20)
        if prefix:
            store.prefix[None, 0] = ahead[0], ahead[1]
        plan = PrefillPlan(lengths, list(range(len(lengths))), store, prefix, "cpu", found)
        results.append((plan.attend(None, *new, rule), *store.own[None, 0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@needs_gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_on_a_gpu(family, tiny_model, monkeypatch):
    """Recorded steps: tokens of transformers' layers in fp32, and each key of steps is recorded once."""
    model = load(tiny_model(family)).cuda()
    records = []
    record = GraphRecorder.record
    monkeypatch.setattr(GraphRecorder, "record", lambda self, call: records.append(call.args) or record(self, call))
    engine, plain = (Engine(model, device="cuda", fast=fast) for fast in (True, False))
    prompts = prompts_of((3, 45, 20, 1, 33, 7, 2), prefix=13)
    base = Decoding(24, (3, 50, 51), greedy=True, batch_size=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decode")  # neither slower layers nor steps without a record
        for changes in ({}, {"greedy": False, "temperature": 1.5}, {"greedy": False, "top_k": 0, "top_p": 0.9}):
            assert answers(engine, prompts, base, **changes) == answers(plain, prompts, base, **changes)
    assert engine.trusted and records


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_in_half_precision(dtype, tiny_model):
    """Wide heads and flash attention in prefill: states within rounding, and no wait for the GPU in a step."""
    engine = Engine(load(tiny_model("qwen3"), dtype=dtype).cuda(), device="cuda")
    prompts, decoding = prompts_of((30, 9, 4), prefix=20), Decoding(20, (), greedy=True)
    first = answers(engine, prompts, decoding)
    with engine.fixed_weights():
        assert answers(engine, prompts, decoding) == first
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert answers(engine, prompts, decoding) == first
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert engine.trusted
