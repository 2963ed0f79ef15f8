"""The synthetic mixture and prompts."""

from __future__ import annotations

import numpy as np
import pytest
from bench.rows import Prompts, Rows, make_prompts, make_rows, order_rows, plain_tokens, row_lengths
from hypothesis import given, settings
from hypothesis import strategies as st

VOCABULARY = np.arange(3, 500, dtype=np.int32)


def test_lengths_are_those_of_the_mixture():
    lengths, task = row_lengths(20_000, np.random.default_rng(0))
    assert task.mean() == 0.05
    assert abs(lengths[task].mean() - 560) < 3
    assert abs(np.median(lengths[~task]) - 110) < 2
    assert 120 < lengths[~task].mean() < 130 and lengths[~task].max() == 512


@given(n=st.integers(1, 90), seed=st.integers(0, 2**32), scale=st.sampled_from([1.0, 0.3, 0.05]))
@settings(max_examples=60)
def test_rows_hold_together(n, seed, scale):
    rows = make_rows(n, VOCABULARY, seed, scale)
    assert len(rows) == n and rows.starts[-1] == len(rows.ids)
    assert (rows.prompts >= 1).all() and (rows.trained >= 1).all()
    assert np.isin(rows.ids, VOCABULARY).all()
    whole = [rows.task[i : i + 20].sum() for i in range(0, n - 19, 20)]
    assert whole == [1] * len(whole)
    heads = {tuple(rows.row(int(i))[0][: round(280 * scale)]) for i in np.flatnonzero(rows.task)}
    assert len(heads) <= 1
    for i in range(n):
        ids, prompt = rows.row(i)
        assert rows.labels(i) == [-100] * prompt + ids[prompt:].tolist()


def test_half_of_the_tokens_are_trained_and_seeds_repeat():
    rows = make_rows(2_000, VOCABULARY, 1)
    assert 0.44 < rows.trained.sum() / rows.lengths.sum() < 0.54
    again = make_rows(2_000, VOCABULARY, 1)
    assert (rows.ids == again.ids).all() and (rows.prompts == again.prompts).all()
    assert (make_rows(2_000, VOCABULARY, 2).ids[:1000] != rows.ids[:1000]).any()


@given(
    lengths=st.lists(st.integers(1, 600), min_size=24, max_size=24),
    how=st.sampled_from(["given", "step", "turn"]),
)
def test_a_turn_holds_the_same_rows_in_every_order(lengths, how):
    order = order_rows(np.array(lengths), 4, [1, 2, 3], how)
    for begin, end in ((0, 4), (4, 12), (12, 24)):
        assert sorted(order[begin:end]) == list(range(begin, end))
    if how == "step":
        assert all(sorted(order[i : i + 4]) == list(range(i, i + 4)) for i in range(0, 24, 4))
    if how != "given":
        assert [lengths[i] for i in order[:4]] == sorted(lengths[:4], reverse=True)


@given(n=st.integers(1, 60), seed=st.integers(0, 2**32))
@settings(max_examples=40)
def test_prompts_share_their_prefix_and_nothing_exceeds_its_limit(n, seed):
    prompts = make_prompts(n, VOCABULARY, seed)
    assert len(prompts.ids) == len(prompts.limits) == n
    assert len({tuple(ids[:300]) for ids in prompts.ids}) == 1
    assert all(len(ids) > 300 for ids in prompts.ids)
    assert all(4 <= limit <= 192 for limit in prompts.limits)


def test_files_give_back_what_was_saved(tmp_path):
    rows, prompts = make_rows(30, VOCABULARY, 0), make_prompts(3, VOCABULARY, 0)
    rows.save(tmp_path / "rows.npz")
    prompts.save(tmp_path / "prompts.json")
    again = Rows.load(tmp_path / "rows.npz")
    for name in ("ids", "starts", "prompts", "task"):
        assert (getattr(again, name) == getattr(rows, name)).all()
    assert Prompts.load(tmp_path / "prompts.json") == prompts


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_no_special_token_is_drawn(tiny_model, family):
    from transformers import AutoTokenizer

    folder = tiny_model(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = set(plain_tokens(folder).tolist())
    assert tokens == set(range(len(tokenizer))) - set(tokenizer.all_special_ids) - set(tokenizer.added_tokens_decoder)
