"""What can be tested of the vLLM engine without vLLM and a GPU: how it is chosen, and what goes in and comes out."""

from __future__ import annotations

import importlib.util

import pytest

from tell.errors import TellError
from tell.generate.engine import Answer
from tell.generate.sampler import Decoding
from tell.generate.vllm_engine import NEVER, answer_of, pick_engine, reserved_rank, sampling


def test_the_engine_is_ours_without_vllm_or_gpu(monkeypatch):
    assert pick_engine("auto", "cpu") == pick_engine("own", "cuda") == "own"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "vllm" else None)
    assert pick_engine("auto", "cuda:0") == pick_engine("vllm", "cuda") == "vllm"
    assert pick_engine("own", "cuda") == pick_engine("auto", "cpu") == "own"
    with pytest.raises(TellError, match="vLLM needs a GPU, and the model is on cpu"):
        pick_engine("vllm", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert pick_engine("auto", "cuda") == "own"
    with pytest.raises(TellError, match=r"vLLM is not installed\. Install tell-llm\[vllm\]"):
        pick_engine("vllm", "cuda")


def test_sampling_parameters():
    paper = sampling(Decoding(64, (2, 7), seed=3), 5, 20)
    assert paper.pop("seed") != sampling(Decoding(64, (2, 7), seed=3), 6, 20)["seed"]
    assert paper == {
        "max_tokens": 20,
        "repetition_penalty": 1.05,
        "stop_token_ids": [2, 7],
        "ignore_eos": True,
        "detokenize": False,
        "temperature": 0.3,
        "top_p": 0.7,
        "top_k": 20,
    }
    greedy = sampling(Decoding(64, (), greedy=True, banned_ids=(4, 9)), 0, 64)
    assert greedy["temperature"] == 0 and "top_p" not in greedy and "seed" not in greedy
    assert greedy["logit_bias"] == {4: NEVER, 9: NEVER}
    assert sampling(Decoding(64, (), top_k=0), 0, 64)["top_k"] == -1


def test_answers_hold_no_stop_token():
    assert answer_of([5, 6, 2], "stop", (2,)) == Answer([5, 6], "stop")
    assert answer_of([5, 6], "stop", (2,)) == Answer([5, 6], "stop")
    assert answer_of((2,), "length", (2,)) == Answer([], "stop")  # a stop token in the last place allowed
    assert answer_of([5, 6], "length", (2,)) == Answer([5, 6], "length")
    assert answer_of([], "length", (2,)) == Answer([], "length")


def test_reserved_rank():
    assert [reserved_rank(r) for r in (1, 8, 9, 64, 200)] == [8, 8, 16, 64, 256]
    with pytest.raises(TellError, match="rank 513 is more than vLLM's 512"):
        reserved_rank(513)
