"""Packed passes give the loss and gradients of plain transformers, row by row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tell.config_sections import TrainConfig
from tell.errors import TellError
from tell.rows.prefix import common_prefix
from tell.train.lora import add_lora
from tell.train.packing import pack, split_packs
from tell.train.plain import PlainBody, plain_step_loss
from tell.train.row_losses import row_losses
from tell.train.step import Body, StepRules, step_loss
from train.packed import assert_close, gradients, load, make_rows, make_table, reference_loss, wake

NORMALIZATIONS = ("example", "token")
CONFIG = TrainConfig(lora_dropout=0.0, lora_r=4)
# longer than the sliding windows of 32, one row of 2 tokens, equal and unequal lengths
LENGTHS = (70, 41, 41, 40, 12, 2)


def ours(folder, rows, *, config=CONFIG, **rules):
    model = add_lora(load(folder), config, seed=1)
    wake(model)
    out = step_loss(Body(model), rows, StepRules(**rules))
    return out, gradients(model)


def theirs(folder, rows, *, config=CONFIG, **options):
    """peft's own forward on transformers' eager attention."""
    model = add_lora(load(folder), config, seed=1, fused=False)
    wake(model)
    loss = reference_loss(model, rows, **options)
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_transformers(family, tiny_model):
    """Whole step, shared prefix, several packs, both normalisations and a task weight against one reference."""
    folder = tiny_model(family)
    rows = make_rows(LENGTHS, task=(0, 3))
    for normalization, weight in (("example", 3.0), ("token", 1.0), ("token", 0.25)):
        expected, grads = theirs(folder, rows, normalization=normalization, task_weight=weight)
        for micro in (10_000, 90, 1):
            out, got = ours(folder, rows, normalization=normalization, task_weight=weight, micro_tokens=micro)
            assert out.loss == pytest.approx(expected, rel=1e-5)
            assert_close(got, grads)
            assert out.tokens == sum(LENGTHS) and sorted(out.source) == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("prefix", [9, 40])
def test_shared_prefix_equals_unshared(family, prefix, tiny_model):
    """A prefix inside and beyond the sliding window; trained tokens right behind it and, in one row, inside."""
    folder = tiny_model(family)
    rows = make_rows((prefix + 50, prefix + 7, prefix + 1, prefix + 20), prefix=prefix, task=(1, 2))
    for row in rows[:2]:
        row.mask[prefix - 3 :] = True
    rows[2].mask[:] = False
    rows[2].mask[prefix] = True
    expected, grads = theirs(folder, rows, normalization="example")
    for micro in (10_000, prefix + 60):
        out, got = ours(folder, rows, normalization="example", share_prefix=True, micro_tokens=micro)
        assert out.loss == pytest.approx(expected, rel=1e-5)
        assert_close(got, grads)
        assert out.tokens == sum(len(row.ids) for row in rows)
    assert len(pack(rows, share_prefix=True).ids) == sum(len(row.ids) for row in rows) - 3 * prefix


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("prefix", [0, 20])
def test_neighbours_do_not_see_each_other(family, prefix, tiny_model):
    body = Body(load(tiny_model(family)))
    rows = make_rows((60, 45, 44, 30), prefix=prefix)
    before = pack(rows, share_prefix=True)
    states = body.states(before)
    for changed in range(4):
        others = list(rows)
        others[changed] = make_rows((len(rows[changed].ids),), seed=9)[0]
        others[changed].ids[:prefix] = rows[0].ids[:prefix]
        others[changed].mask[:] = rows[changed].mask
        after = pack(others, share_prefix=True)
        moved = (body.states(after) - states).abs().amax(dim=1)
        scale = states.abs().max()
        assert moved[before.row != changed].max() <= 1e-6 * scale
        assert moved[before.row == changed].max() > 1e-2 * scale


def test_a_later_token_changes_nothing_before_it(tiny_model):
    body = Body(load(tiny_model("mistral")))
    (row,) = make_rows((50,))
    row.mask[1:] = True
    before = body.states(pack([row], share_prefix=False))
    row.ids[30] += 1
    moved = (body.states(pack([row], share_prefix=False)) - before).abs().amax(dim=1)
    assert moved[:30].max() == 0 and moved[30:].min() > 0  # state t predicts token t + 1
    assert len(moved) == 49


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_row_losses(family, tiny_model):
    """Losses without training, of chosen rows, in their order; the model is left as it was."""
    model, plain = load(tiny_model(family)), load(tiny_model(family))
    rows = make_rows((50, 12, 60, 33), prefix=10)
    table = make_table(rows, "general")
    expected = [float(reference_loss(plain, [row], normalization="example")) for row in rows]
    model.train()
    assert row_losses(model, table) == pytest.approx(expected, rel=1e-5)
    assert model.training
    seen: list[int] = []
    chosen = row_losses(model, table, [3, 0], micro_tokens=1, progress=seen.append)
    assert chosen == pytest.approx([expected[3], expected[0]], rel=1e-5) and seen == [1, 1]


def test_losses_of_rows_stand_beside_their_sources(tiny_model):
    rows = make_rows((30, 12, 25), task=(1,))
    plain = load(tiny_model("llama"))
    out = step_loss(Body(load(tiny_model("llama"))), rows, StepRules("token", micro_tokens=30), backward=False)
    expected = {float(reference_loss(plain, [row], normalization="example")): row.source for row in rows}
    got = dict(zip(out.rows.tolist(), out.source.tolist(), strict=True))
    for (a, source), (b, other) in zip(sorted(got.items()), sorted(expected.items()), strict=True):
        assert a == pytest.approx(b, rel=1e-5) and source == other


def test_bfloat16_is_close(tiny_model):
    rows = make_rows(LENGTHS)
    out, grads = ours(tiny_model("llama"), rows, normalization="example")
    model = add_lora(load(tiny_model("llama"), dtype=torch.bfloat16), CONFIG, seed=1)
    wake(model)
    rough = step_loss(Body(model), rows, StepRules("example"))
    assert rough.loss == pytest.approx(out.loss, rel=0.01) and rough.loss != out.loss
    got = gradients(model)
    assert all(g.dtype == torch.float32 for g in got.values())
    a, b = (torch.cat([x[name].flatten() for name in grads]) for x in (got, grads))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    prefix=st.integers(0, 30),
    micro=st.integers(1, 200),
    share=st.booleans(),
    data=st.data(),
)
def test_packs_hold_every_row_once(lengths, prefix, micro, share, data):
    lengths = [length + prefix for length in lengths]
    task = [i for i in range(len(lengths)) if data.draw(st.booleans())]
    rows = make_rows(lengths, prefix=prefix, task=task)
    groups = split_packs(rows, micro, share_prefix=share)
    assert sorted(id(row) for group in groups for row in group) == sorted(map(id, rows))
    for group in groups:
        batch = pack(group, share_prefix=share)
        assert len(batch.ids) <= micro or len(group) == 1
        assert batch.real == sum(len(row.ids) for row in group)
        assert len(batch.targets) == sum(int(row.mask.sum()) for row in group)
        # the packed tokens, positions and targets are those of the rows
        flat, places = batch.ids.numpy(), batch.plan.positions()[0].numpy()
        at = batch.plan.prefix
        for r, row in enumerate(group):
            own = len(row.ids) - batch.plan.prefix
            index = np.concatenate([np.arange(batch.plan.prefix), np.arange(at, at + own)])
            assert np.array_equal(flat[index], row.ids) and np.array_equal(places[index], np.arange(len(row.ids)))
            mine = batch.row.numpy() == r
            assert np.array_equal(batch.targets.numpy()[mine], row.ids[row.mask])
            assert np.array_equal(flat[batch.predictors.numpy()[mine]], row.ids[np.flatnonzero(row.mask) - 1])
            at += own


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), prefix=st.integers(0, 10))
def test_common_prefix_leaves_a_token_to_each(lengths, prefix):
    rows = make_rows([length + prefix + 1 for length in lengths], prefix=prefix)
    length = common_prefix([row.ids for row in rows])
    shortest = min(len(row.ids) for row in rows)
    assert prefix <= length < shortest
    heads = {tuple(row.ids[:length].tolist()) for row in rows}
    assert len(heads) == 1
    if length < shortest - 1:
        assert len({int(row.ids[length]) for row in rows}) > 1


def _other(name: str):
    """Random models beyond the seven families."""
    import transformers as t

    small = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2}
    gpt2 = t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=400, initializer_range=0.2)
    config = {
        "gpt2": lambda: gpt2,
        "phi": lambda: t.PhiConfig(**small),
        "granite": lambda: t.GraniteConfig(**small, logits_scaling=3.0, attention_multiplier=0.2),
        "cohere": lambda: t.CohereConfig(**small, logit_scale=0.3),
        "olmo2": lambda: t.Olmo2Config(**small),
        "smollm3": lambda: t.SmolLM3Config(**small, no_rope_layer_interval=2),
        "gpt_neox": lambda: t.GPTNeoXConfig(**small),
        "gpt_oss": lambda: t.GptOssConfig(**small, num_local_experts=2, head_dim=8),
        "mamba": lambda: t.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2),
        "lfm2": lambda: t.Lfm2Config(**small, layer_types=["conv", "full_attention"]),
        "bloom": lambda: t.BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4),
        "llama4": lambda: t.Llama4TextConfig(**small, num_local_experts=2, head_dim=8),
    }[name]()
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), torch.nn.Parameter):
            torch.nn.init.normal_(module.bias, std=0.3)
    return model


@pytest.mark.parametrize("name", ["gpt2", "phi", "granite", "cohere", "olmo2", "smollm3", "gpt_neox"])
def test_other_architectures(name):
    """Output bias, scaled logits, learned positions, layers without positions, weights stored (in, out)."""
    rows = make_rows((50, 31, 30), prefix=12)
    expected = float(reference_loss(_other(name), rows, normalization="token"))
    out = step_loss(Body(_other(name)), rows, StepRules("token", share_prefix=True), backward=False)
    assert out.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["gpt_oss", "mamba", "lfm2", "bloom", "llama4"])
def test_architectures_that_would_mix_rows_are_refused(name):
    with pytest.raises(TellError, match=r"Use a plain transformer"):
        Body(_other(name))


@pytest.mark.parametrize("normalization", ["example", "token"])
@pytest.mark.parametrize("plain", [False, True])
def test_a_rows_weight_multiplies_its_loss(plain, normalization, tiny_model):
    """Rows of weight 1 give the same bits as rows without weights; others as much of the loss as they weigh."""
    model = load(tiny_model("llama"))
    rows = make_rows([9, 17, 5, 12], task=[0, 2])
    rules = StepRules(normalization, 2.0, 24)

    def loss(given) -> float:
        body = PlainBody(model) if plain else Body(model)
        return (plain_step_loss if plain else step_loss)(body, given, rules, backward=False).loss

    assert loss([replace(row, weight=1.0) for row in rows]) == loss(rows)
    single = [loss([replace(row, weight=float(i == j)) for j, row in enumerate(rows)]) for i in range(4)]
    assert sum(single) == pytest.approx(loss(rows), rel=1e-5)
    weights = [1.0, 0.25, 0.5, 0.0]
    weighed = loss([replace(row, weight=weight) for row, weight in zip(rows, weights, strict=True)])
    assert weighed == pytest.approx(float(np.dot(weights, single)), rel=1e-5)
