"""The engine decodes what plain transformers decodes, however rows are batched."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

import tiny
from tell.config_sections import GenerateConfig, TrainConfig
from tell.decode import engine as engines
from tell.decode.batch import Packed
from tell.decode.engine import Engine, shared_prefix
from tell.decode.sampler import Decoding
from tell.errors import TellError
from tell.kernels.decode_ops import kernels
from tell.train.lora import add_lora, remove_lora, save_adapter
from train.packed import load, wake


def prompts_of(lengths, *, prefix: int = 0, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    head = rng.integers(10, 300, prefix).tolist()
    return [head + rng.integers(10, 300, length).tolist() for length in lengths]


def reference(model, prompts, decoding: Decoding) -> list[tuple[list[int], str]]:
    """Greedy answers of ``transformers.generate``, one prompt at a time."""
    out = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=decoding.max_new_tokens,
            repetition_penalty=decoding.repetition_penalty,
            eos_token_id=list(decoding.stop_ids),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        stopped = ids[-1] in decoding.stop_ids
        out.append((ids[:-1] if stopped else ids, "stop" if stopped else "length"))
    return out


def answers(engine: Engine, prompts, decoding: Decoding, **changes) -> list[tuple[list[int], str]]:
    changed = dataclasses.replace(decoding, **changes)
    return [(answer.ids, answer.finish) for answer in engine.generate(prompts, changed)]


@pytest.mark.parametrize("penalty", [1.0, 1.05])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_equals_transformers(family, penalty, tiny_model):
    """Prompts and answers within and beyond the sliding window of 32; rows end at different times."""
    plain = load(tiny_model(family))
    engine = Engine(load(tiny_model(family)))
    for prefix in (0, 12, 40):
        prompts = prompts_of((3, 45, 20, 1, 33), prefix=prefix)
        # what the untrained model happens to write ends some rows early
        free = Decoding(28, (), greedy=True, repetition_penalty=penalty)
        written = answers(engine, prompts, free)
        stops = (written[0][0][5], written[1][0][20], written[2][0][0])
        decoding = dataclasses.replace(free, stop_ids=stops)
        expected = reference(plain, prompts, decoding)
        assert {finish for _, finish in expected} >= {"stop"} and expected[2] == ([], "stop")
        for batch in (1, 2, 5, 64):
            assert answers(engine, prompts, decoding, batch_size=batch) == expected
        assert answers(engine, prompts[1:2], decoding) == expected[1:2]  # no prefix to share


def test_many_rows_through_few_slots(tiny_model):
    engine, plain = Engine(load(tiny_model("qwen2"))), load(tiny_model("qwen2"))
    prompts = prompts_of(range(1, 24), prefix=9)
    decoding = Decoding(20, tuple(range(0, 400, 9)), greedy=True, repetition_penalty=1.2)
    expected = reference(plain, prompts, decoding)
    assert len({len(ids) for ids, _ in expected}) > 5
    for batch in (3, 8):
        events, tokens = [], []
        changed = dataclasses.replace(decoding, batch_size=batch)
        got = engine.generate(
            prompts,
            changed,
            progress=lambda new, done: events.append((new, done)),  # noqa: B023
            on_token=lambda row, token: tokens.append((row, token)),  # noqa: B023
        )
        assert [(answer.ids, answer.finish) for answer in got] == expected
        further = [moved for _, moved in events]
        assert sum(further) == pytest.approx(len(prompts)) and min(further) > 0  # each step moves, not only the last
        assert max(new for new, _ in events) <= batch
        # streamed tokens are the answers, stop tokens left out
        for row, (ids, _) in enumerate(expected):
            assert [token for owner, token in tokens if owner == row] == ids
        # each forward pass writes a token a row, the stop token included
        assert sum(new for new, _ in events) == sum(len(ids) + (finish == "stop") for ids, finish in expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_sampled_answers_depend_on_seed_and_row_alone(family, tiny_model):
    engine = Engine(load(tiny_model(family)))
    prompts = prompts_of((4, 30, 7, 7, 50, 2), prefix=10)
    decoding = Decoding(16, (3, 50, 51), temperature=1.5, top_k=0, top_p=0.95, seed=5)
    expected = answers(engine, prompts, decoding)
    for batch in (1, 2, 4):
        assert answers(engine, prompts, decoding, batch_size=batch) == expected
    assert answers(engine, prompts, decoding, seed=6) != expected
    others = [*prompts[:3], *prompts_of((9, 60, 5), seed=8)]  # other neighbours, no shared prefix
    assert answers(engine, others, decoding)[:3] == expected[:3]
    twice = answers(engine, [prompts[0], prompts[0]], decoding)
    assert twice[0] == expected[0] and twice[1] != expected[0]  # rows draw numbers of their own


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_merged_adapter_decodes_as_unmerged_peft(family, tiny_model, tmp_path):
    base = load(tiny_model(family))
    engine = Engine(base)
    prompts = prompts_of((12, 40, 3), prefix=5)
    decoding = Decoding(20, (), greedy=True, repetition_penalty=1.05)
    before = answers(engine, prompts, decoding)
    model = add_lora(base, TrainConfig(lora_r=4), seed=1)
    wake(model)
    save_adapter(model, tmp_path)
    base = remove_lora(model)
    unmerged = PeftModel.from_pretrained(load(tiny_model(family)), tmp_path)
    with engine.adapter(tmp_path):
        tuned = answers(engine, prompts, decoding)
    assert tuned == reference(unmerged, prompts, decoding) and tuned != before
    assert answers(engine, prompts, decoding) == before


def test_how_answers_were_decoded(tiny_model, monkeypatch):
    model, prompts, decoding = load(tiny_model("llama")), prompts_of((5, 9)), Decoding(3, (), greedy=True)
    engine, plain = Engine(model), Engine(model, fast=False)
    assert engine.how == plain.how == ""
    answers(plain, prompts, decoding)
    assert plain.how == "transformers' layers"
    answers(engine, prompts, decoding)
    if kernels(torch.float32):
        assert engine.how == "kernels"
    monkeypatch.setattr(engines, "kernels", lambda dtype: None)
    answers(engine, prompts, decoding)
    assert engine.how == "transformers' layers (this machine has no kernels for the model)"


def test_banned_tokens_are_never_written(tiny_model):
    engine = Engine(load(tiny_model("llama")))
    prompts = prompts_of((5, 9))
    decoding = Decoding(12, (), greedy=True)
    first = answers(engine, prompts, decoding)
    banned = tuple({token for ids, _ in first for token in ids})
    for greedy in (True, False):
        again = answers(engine, prompts, decoding, banned_ids=banned, greedy=greedy, temperature=2.0)
        assert not {token for ids, _ in again for token in ids} & set(banned)


def test_limits(tiny_model):
    """max_new_tokens, the end of the context, and a prompt that fills it."""
    model = load(tiny_model("llama"))
    decoding = Decoding(9, (), greedy=True)
    prompts = prompts_of((10, 26))
    got = Engine(model, max_positions=30).generate(prompts, decoding)
    assert [len(answer.ids) for answer in got] == [9, 4] and {answer.finish for answer in got} == {"length"}
    with pytest.raises(TellError, match=r"prompt 2: the prompt has 26 tokens and the model takes 26\. Shorten"):
        Engine(model, max_positions=26).generate(prompts, decoding)
    assert Engine(model).max_positions == 1024
    assert Engine(model).generate([], decoding) == []
    (single,) = Engine(model).generate([[7]], dataclasses.replace(decoding, max_new_tokens=1))
    assert len(single.ids) == 1


@pytest.mark.parametrize("fast", [True, False])
def test_the_caller_ends_rows(fast, tiny_model):
    """A row ends with the token for which `on_token` returns True; the others go on as before."""
    engine = Engine(load(tiny_model("llama")), fast=fast)
    prompts = prompts_of((3, 30, 12, 7))
    decoding = Decoding(max_new_tokens=12, stop_ids=(), greedy=True, batch_size=2)
    whole = engine.generate(prompts, decoding)
    seen = [0] * len(prompts)

    def ended(row: int, token: int) -> bool:
        seen[row] += 1
        return row != 1 and seen[row] == 2 + row

    cut = engine.generate(prompts, decoding, on_token=ended)
    assert [answer.ids for answer in cut] == [
        answer.ids if row == 1 else answer.ids[: 2 + row] for row, answer in enumerate(whole)
    ]
    assert [answer.finish for answer in cut] == ["stop", "length", "stop", "stop"]


def test_decoding_leaves_no_trace(tiny_model):
    """The mode comes back, weights stay, and a training pass after decoding still has gradients."""
    model = load(tiny_model("llama"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(model)
    prompts = prompts_of((5, 9))
    decoding = Decoding(6, (), seed=1, temperature=1.0)
    first = answers(engine, prompts, decoding)
    torch.manual_seed(99)  # the global generator has no say
    model.train()
    assert answers(engine, prompts, decoding) == first and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.skipif(kernels(torch.float32) is None, reason="no kernels")
def test_fixed_weights_are_packed_once_and_others_each_time(tiny_model, monkeypatch):
    packs = []
    monkeypatch.setattr(engines, "Packed", lambda *parts: packs.append(0) or Packed(*parts))
    engine = Engine(load(tiny_model("llama")))
    prompts, decoding = prompts_of((5, 9)), Decoding(6, (), greedy=True)
    first = answers(engine, prompts, decoding)
    with engine.fixed_weights():
        assert [answers(engine, prompts, decoding) for _ in range(3)] == [first] * 3
    assert len(packs) == 2
    with torch.no_grad():
        engine.model.lm_head.weight.neg_()
    changed = answers(engine, prompts, decoding)
    assert changed != first and changed == answers(Engine(engine.model, fast=False), prompts, decoding)
    assert len(packs) == 3


@given(
    prefix=st.lists(st.integers(0, 3), max_size=6),
    tails=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=5),
)
def test_shared_prefix(prefix, tails):
    prompts = [prefix + tail for tail in tails]
    length = shared_prefix(prompts)
    if len(prompts) == 1:
        assert length == 0
        return
    limit = min(map(len, prompts)) - 1
    expected = next((i for i in range(limit) if len({p[i] for p in prompts}) > 1), limit)
    assert length == expected


def test_decoding_of_a_configuration():
    config = GenerateConfig(greedy=True, temperature=0.5, top_k=7, top_p=0.6, repetition_penalty=1.3, batch_size=9)
    decoding = Decoding.of(config, max_new_tokens=33, stop_ids=(1, 2), seed=4)
    assert decoding == Decoding(33, (1, 2), True, 0.5, 7, 0.6, 1.3, 9, 4)
    config.max_new_tokens = 5
    assert Decoding.of(config, max_new_tokens=33, stop_ids=(1,), seed=4).max_new_tokens == 5


class Desk:
    """Hands requests to an engine, some after a number of tokens of others, and keeps what it hears."""

    def __init__(self, prompts, limits, later: dict[int, int]) -> None:
        self.prompts, self.limits, self.later = prompts, limits, later
        self.tokens: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        self.ended: dict[int, engines.Answer] = {}
        self.leaves: dict[int, int] = {}

    def request(self, i: int) -> engines.Request:
        def hear(token: int) -> bool:
            self.tokens[i].append(token)
            return len(self.tokens[i]) == self.leaves.get(i)

        return engines.Request(self.prompts[i], self.limits[i], 5, hear, lambda answer: self.ended.update({i: answer}))

    def arrivals(self, free, fits):
        heard = sum(map(len, self.tokens.values()))
        ready = [i for i, after in self.later.items() if heard >= after and fits(self.request(i))][:free]
        for i in ready:
            del self.later[i]
        return [self.request(i) for i in ready]


def check_arrivals(engine, alone_engine, limits, *, greedy):
    """Each answer is that of the prompt alone with its seed, by ``alone_engine``; who leaves ends his own row only."""
    prompts = prompts_of((3, 45, 20, 1, 33, 70), prefix=7)
    decoding = Decoding(1, (), greedy=greedy, batch_size=4, seed=0)
    desk = Desk(prompts, limits, {2: 3, 3: 10, 4: 11, 5: 40})
    desk.leaves[3] = 8
    engine.serve([desk.request(0), desk.request(1)], decoding, desk.arrivals, prefix=prompts[0][:7])
    assert not desk.later and len(desk.ended) == 6
    for i, prompt in enumerate(prompts):
        rule = dataclasses.replace(decoding, max_new_tokens=limits[i], seed=5)
        alone = alone_engine.generate([prompt], rule)[0]
        if i == 3:
            alone = engines.Answer(alone.ids[:8], "stop")
        assert desk.ended[i] == alone and desk.tokens[i] == alone.ids


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("greedy", [True, False])
def test_requests_that_arrive_while_others_are_answered(family, greedy, tiny_model):
    for fast in (True, False):
        engine = Engine(load(tiny_model(family)), fast=fast)
        check_arrivals(engine, engine, [30, 12, 25, 40, 18, 9], greedy=greedy)


def test_a_request_that_does_not_fit_waits(tiny_model, monkeypatch):
    monkeypatch.setattr(engines, "ROOM", 32)
    engine = Engine(load(tiny_model("llama")))
    prompts = [*prompts_of((5,), prefix=6), *prompts_of((9,), prefix=6, seed=1), *prompts_of((60,), prefix=6)]
    desk = Desk(prompts, [12, 12, 12], {1: 0, 2: 0})
    engine.serve([desk.request(0)], Decoding(1, (), greedy=True), desk.arrivals, prefix=prompts[0][:6])
    assert sorted(desk.ended) == [0] and sorted(desk.later) == [1, 2]  # another prefix; too long
