"""What can be tested of the vLLM engine without vLLM and a GPU: how it is chosen, and what goes in and comes out."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from tell.config_sections import TrainConfig
from tell.decode.engine import Engine
from tell.decode.engine_rows import Answer
from tell.decode.sampler import Decoding
from tell.decode.vllm_engine import CHECK, LONGEST, NEVER, VllmEngine, answer_of, reserved_rank, sampling
from tell.errors import TellError
from tell.run.session import pick_engine
from tell.train.lora import add_lora, remove_lora, save_adapter
from train.packed import load


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


@dataclass
class LoRARequest:
    """As vLLM's: name, number, folder."""

    name: str
    number: int
    folder: str


class LLM:
    """Where vLLM would begin: keeps what it is given, and answers each prompt with its own first token and a stop.

    Attributes:
        loses: an adapter loaded before a sleep is not applied after it; "all": none is applied any more.
        breaks: the wake-up after so many sleeps finds no memory, in these words.
    """

    loses = ""
    breaks: tuple[int, str] | None = None

    def __init__(self, **settings):
        self.settings, self.calls, self.asleep, self.lost = settings, [], [], set()
        self.environment = dict(os.environ)

    def sleep(self, level):
        assert level == 1 and self.asleep[-1:] != [True]  # its weights are kept
        self.asleep.append(True)
        self.lost |= {request.number for *_, request in self.calls if request}

    def wake_up(self):
        if self.breaks and self.asleep.count(True) == self.breaks[0]:
            raise torch.OutOfMemoryError(self.breaks[1])
        self.asleep.append(False)

    def generate(self, prompts, parameters, *, lora_request, use_tqdm):
        assert self.asleep[-1:] != [True]
        self.calls.append((prompts, parameters, lora_request))
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        applied = lora_request and not (self.loses == "all" and self.lost)
        applied = applied and not (self.loses and lora_request.number in self.lost)
        if parameters[0].max_tokens == CHECK[1]:
            ids = [[9 if applied else 8] for _ in ids]
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=(*row[:1], 2), finish_reason="stop")]) for row in ids
        ]

    def answered(self):
        """Calls for answers, without those for checks."""
        return [call for call in self.calls if call[1][0].max_tokens != CHECK[1]]


@pytest.fixture
def vllm(monkeypatch):
    """vLLM's entrances; what lies behind them needs a GPU."""
    names = {"vllm": {"LLM": LLM, "SamplingParams": SimpleNamespace}, "vllm.lora": {}}
    names["vllm.lora.request"] = {"LoRARequest": LoRARequest}
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def written(model, folder, seed=1):
    """A LoRA adapter of a model that changes its answers."""
    tuned = add_lora(model, TrainConfig(lora_r=4), seed=seed)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_()
    save_adapter(tuned, folder)
    remove_lora(tuned)
    return folder


def test_adapters_are_requested_by_number(vllm, tiny_model, tmp_path):
    folder, model = tiny_model("llama"), load(tiny_model("llama"))
    for seed in (1, 2):
        written(model, tmp_path / str(seed), seed)
    engine = VllmEngine(folder, model, max_positions=1 << 20, dtype="fp32", rank=4)
    settings = engine.llm.settings
    assert (settings["model"], settings["dtype"], settings["max_lora_rank"]) == (str(folder), "float32", 8)
    assert settings["max_model_len"] == engine.max_positions == LONGEST
    assert engine.device == torch.device("cpu")
    decoding = Decoding(64, (2,))
    answers, streamed, steps = [], [], []
    for adapter in (None, tmp_path / "1", tmp_path / "2", tmp_path / "1"):
        with engine.adapter(adapter):
            answers += engine.generate(
                [[5, 6], [7]], decoding, limits=[3, 9], on_token=lambda *x: streamed.append(x),
                progress=lambda *x: steps.append(x),
            )  # fmt: skip
    engine.generate([[5]], decoding)
    assert [call[2] and (call[2].number, call[2].folder) for call in engine.llm.answered()] == [
        None,
        (1, str(tmp_path / "1")),
        (2, str(tmp_path / "2")),
        (1, str(tmp_path / "1")),
        None,
    ]
    assert [p.max_tokens for p in engine.llm.answered()[0][1]] == [3, 9]
    assert answers == [Answer([5], "stop"), Answer([7], "stop")] * 4
    assert streamed == [(0, 5), (1, 7)] * 4 and steps == [(2, 1)] * 8


def test_a_broken_adapter_or_a_full_prompt_is_refused(vllm, tiny_model, tmp_path):
    engine = VllmEngine(tiny_model("llama"), load(tiny_model("llama")), max_positions=4)
    assert engine.generate([], Decoding(8, (2,))) == [] and not engine.llm.answered()
    with pytest.raises(TellError, match=r"prompt 2: the prompt has 4 tokens and the model takes 4"):
        engine.generate([[1], [1, 2, 3, 4]], Decoding(8, (2,)))
    with pytest.raises(ValueError, match="1 limits for 2 prompts"):
        engine.generate([[1], [1, 2]], Decoding(8, (2,)), limits=[3])
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text("{half")
    with pytest.raises(TellError, match=r"adapter_config\.json"), engine.adapter(tmp_path):
        pass


def test_it_sleeps_between_answers_and_gives_memory_back(vllm, tiny_model, monkeypatch):
    """Its process begins without the segments that our own allocator grows, which it cannot sleep with."""
    name = "PYTORCH_CUDA_ALLOC_CONF"
    folder = tiny_model("llama")
    model = load(folder)
    monkeypatch.setenv(name, "expandable_segments:True")
    engine = VllmEngine(folder, model, max_positions=100, rank=4)
    assert name not in engine.llm.environment and os.environ[name] == "expandable_segments:True"
    assert engine.llm.settings["enable_sleep_mode"] and engine.llm.asleep == [True]
    engine.generate([[5]], Decoding(4, (2,)))
    assert [len(call[0]) for call in engine.llm.calls] == [1, 1, 1]  # its check as it starts, as it wakes, the answer
    monkeypatch.setattr(engine.llm, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(TellError, match=r"vLLM fails .*Repeat the command with --set generate\.engine=own.*--resume"):
        engine.generate([[5]], Decoding(4, (2,)))
    assert engine.llm.asleep == [True, False, True, False, True]
    monkeypatch.setenv(name, "max_split_size_mb:64")
    assert VllmEngine(folder, model, max_positions=100, rank=4).llm.environment[name] == "max_split_size_mb:64"


def test_an_adapter_that_a_sleep_loses_is_loaded_again(vllm, tiny_model, tmp_path, monkeypatch):
    """Before it answers: vLLM would answer as the untuned model, without an error."""
    monkeypatch.setattr(LLM, "loses", "that")
    folder, model = tiny_model("llama"), load(tiny_model("llama"))
    engine = VllmEngine(folder, model, max_positions=100, rank=4)
    with engine.adapter(written(model, tmp_path / "1")):
        engine.generate([[5]], Decoding(4, (2,)))
        assert "loaded again" in engine.how
        engine.generate([[5]], Decoding(4, (2,)))
    assert engine.name == "vllm" and [request.number for *_, request in engine.llm.answered()] == [2, 3]
    assert engine.llm.asleep == [True, *[False, True] * 3]  # one more, to try the first adapter's sleep
    checked = [request for _, parameters, request in engine.llm.calls if parameters[0].max_tokens == CHECK[1]]
    assert checked[0] is None and checked[1].number == 1


@pytest.mark.parametrize("fault", ["adapter", "memory", "base"])
def test_our_engine_goes_on_where_vllm_fails(fault, vllm, tiny_model, tmp_path, monkeypatch):
    """Inside the adapter, in later ones and with what vLLM refuses; by name it is an error that says what to do."""
    folder, model = tiny_model("llama"), load(tiny_model("llama"))
    adapter, own = written(model, tmp_path / "1"), Engine(model, max_positions=100)
    decoding, prompts = Decoding(4, (2,), greedy=True), [[5, 6], [7]]
    answers = {}
    for place in (None, adapter):
        with own.adapter(place):
            answers[place] = own.generate(prompts, decoding)
    if fault == "adapter":
        monkeypatch.setattr(LLM, "loses", "all")
    elif fault == "memory":
        monkeypatch.setattr(LLM, "breaks", (2, "no room\nat all"))
    why = {"adapter": "the adapter answers otherwise", "memory": "no room", "base": "the base model answers otherwise"}
    engines = [
        VllmEngine(folder, model, max_positions=100, rank=4, own=make)
        for make in (None, lambda: Engine(model, max_positions=100))
    ]
    if fault == "base":
        for engine in engines:
            engine._base.check = engine._base.check[0], [1]
    with engines[0].adapter(adapter), pytest.raises(TellError, match=rf"vLLM fails \({why[fault]}.*Repeat the command"):
        engines[0].generate(prompts, decoding)
    engine = engines[1]
    gone = weakref.ref(engine.llm)
    with engine.adapter(adapter):
        with pytest.warns(UserWarning, match=rf"vLLM failed after it had started \({why[fault]}"):
            assert engine.generate(prompts, decoding) == answers[adapter]
        assert engine.name == "own" and why[fault] in engine.fallback and engine.how and gone() is None
    with engine.adapter(None):
        assert engine.how == "" and engine.generate(prompts, decoding, masks=[None, None]) == answers[None]
    with engine.adapter(adapter):
        assert engine.generate(prompts, decoding) == answers[adapter]
