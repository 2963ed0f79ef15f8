"""Predicted memory, against the bytes that real passes keep."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import tiny
from tell import pass_memory
from tell.config_sections import TrainConfig
from tell.kernels.ops import SILU, kernels_for
from tell.models import machine
from tell.models.architecture import Architecture
from tell.models.find import find_model
from tell.models.flops import lora_parameters
from tell.models.load import load_model
from tell.models.machine import Place
from tell.models.predict import Load, fused_bytes, predict_memory
from tell.models.predict import pass_memory as memory_of_pass
from tell.train.attention import Rule, install, use_plan
from tell.train.fast.exchange import Exchange
from tell.train.fast.fused import forwards_for
from tell.train.fit import count_pass
from tell.train.lora import add_lora
from tell.train.packing import RowTargets, packed_plan
from tell.train.recompute import recomputed_layers
from tell.train.step import Body, StepRules, step_loss
from train.packed import make_rows

SMOLLM2 = Architecture(
    "llama", ("LlamaForCausalLM",), 30, 576, 1536, 9, 3, 64, 49152, True, 8192, 134515008, 106168320, 28311552, True
)
QWEN3 = Architecture(
    "qwen3", ("Qwen3ForCausalLM",), 28, 1024, 3072, 16, 8, 128, 151936, True, 40960,
    596049920, 440401920, 155582464, True,
)  # fmt: skip
LLAMA3 = Architecture(
    "llama", ("LlamaForCausalLM",), 32, 4096, 14336, 32, 8, 128, 128256, False, 8192,
    8030261248, 6979321856, 1050673152, True,
)  # fmt: skip
GPU, CPU = Place("cuda", "bf16"), Place("cpu", "bf16")


class Kept:
    """Counts storages that autograd keeps, weights left out."""

    def __init__(self, model):
        self.model, self.storages = model, {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage  # which holds on to the address
        return tensor

    def __exit__(self, *args):
        self.hooks.__exit__(*args)

    @property
    def bytes(self):
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        return sum(s.nbytes() for at, s in self.storages.items() if at not in own)


def shaped(arch, layers, dtype):
    """A model of that shape, its weights left as they come, on the fast path without its trials."""
    make = {"llama": LlamaConfig, "qwen3": Qwen3Config}[arch.model_type]
    config = make(
        hidden_size=arch.hidden, intermediate_size=arch.intermediate, num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads, head_dim=arch.head_dim, num_hidden_layers=layers, vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    rotary = type(model.base_model.rotary_emb)(config)
    model = model.to_empty(device="cpu")
    model.base_model.rotary_emb = rotary
    install(model)
    forwards = forwards_for(model.lm_head.weight)
    normed = 0.0 if arch.model_type == "qwen3" else None
    for module in list(model.base_model.modules()):
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = Exchange(forwards.norm, module, 0.0)
        elif name.endswith("Attention"):
            module.forward = Exchange(forwards.attention, module, Rule(module.head_dim**-0.5, None, None), normed, True)
        elif name.endswith("MLP"):
            module.forward = Exchange(forwards.mlp, module, SILU)
    return model


def kept_by(arch, layers, dtype, targets, tokens=16):
    model = add_lora(shaped(arch, layers, dtype), TrainConfig(lora_targets=targets), seed=1)
    core, plan = model.get_base_model().base_model, packed_plan([tokens // 2] * 2)
    with Kept(model) as kept, use_plan(plan):
        core(input_ids=torch.zeros(1, tokens, dtype=torch.long), position_ids=plan.positions(), use_cache=False)
    return kept.bytes / tokens


@pytest.mark.skipif(kernels_for(torch.zeros(1)) is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("arch", "dtype", "targets"),
    [
        (SMOLLM2, "bf16", "all-linear"),
        (SMOLLM2, "fp32", "all-linear"),
        (SMOLLM2, "bf16", "qkv"),
        (QWEN3, "bf16", "all-linear"),
        (LLAMA3, "bf16", "all-linear"),
    ],
    ids=lambda value: f"{value.parameters / 1e9:.1f}B" if isinstance(value, Architecture) else value,
)
def test_real_shapes_keep_what_is_predicted(arch, dtype, targets):
    """A layer of the real shape, within 2 %: the first norm of all keeps nothing, but the last one keeps its input."""
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    predicted = fused_bytes(arch, kind.itemsize, rank=8, targets=targets)
    assert kept_by(arch, 1, kind, targets) == pytest.approx(predicted, rel=0.02)


def test_8b_keeps_108_kilobytes_a_token_and_layer_and_on_a_gpu_92():
    for gpu, kilobytes in ((False, 108), (True, 92)):
        kept = fused_bytes(LLAMA3, 2, rank=8, targets="all-linear", gpu=gpu) / 1024
        assert kept == pytest.approx(kilobytes, rel=0.01)


@pytest.mark.skipif(kernels_for(torch.zeros(1)) is None, reason="needs a C compiler")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "gemma2"])  # it caps its scores
def test_families_keep_what_is_predicted(family, dtype, tiny_model):
    """The counts that a run is fitted by, and those a plan is made from."""
    files = find_model(str(tiny_model(family)))
    train, base = TrainConfig(), load_model(files, dtype=dtype, device="cpu").model
    model = add_lora(base, train, seed=1)
    with recomputed_layers(base) as layers:
        counted = count_pass(Body(model), layers, lengths=[64])
    predicted = memory_of_pass(files.architecture, train, Load(64, 64), place=Place("cpu", dtype))
    assert (counted.layers, counted.entry, counted.block) == (predicted.layers, predicted.entry, predicted.block)
    assert counted.kept == pytest.approx(predicted.kept, rel=0.15)  # the first norm of all keeps nothing
    assert counted.rest == pytest.approx(predicted.rest, rel=0.02)


def likely(tokens):
    """Distributions over four tokens and all others."""
    return RowTargets(np.tile(np.arange(4, dtype=np.int32), (tokens, 1)), np.full((tokens, 5), 0.2, np.float32))


@pytest.mark.skipif(kernels_for(torch.zeros(1)) is None, reason="needs a C compiler")
@pytest.mark.parametrize(("level", "soft"), [(0, False), (3, False), (6, False), (6, True)])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_peak_of_a_step_is_what_is_predicted(dtype, level, soft):
    """Every byte that the allocator hands out in a forward and backward pass over 1,000 tokens."""
    vocab = 20_000 if soft else 2000  # else the block of logits of distributions is not the peak
    arch = Architecture("llama", (), 6, 256, 704, 4, 2, 64, vocab, True, None, 0, 0, 0, True)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=6,
        vocab_size=vocab, tie_word_embeddings=True,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=kind).eval().requires_grad_(False)
    model = add_lora(base, train := TrainConfig(), seed=1)
    body, rows = Body(model), make_rows([200] * 5)
    rows = [replace(row, soft=likely(int(row.mask.sum()))) for row in rows] if soft else rows
    with recomputed_layers(base, level):
        step_loss(body, rows[:1], StepRules())  # gradients have their place
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step_loss(body, rows, StepRules())
    events = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    load = Load(200, 1000, soft=soft)
    predicted = memory_of_pass(arch, train, load, place=Place("cpu", dtype)).peak(1000, level)
    assert predicted == pytest.approx(max(accumulate(events)), rel=0.15)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_plain_modules_keep_what_is_predicted(family, dtype, tiny_model):
    """transformers' and peft's own, as they are."""
    files = find_model(str(tiny_model(family)))
    base = load_model(files, dtype=dtype, device="cpu").model
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear")).train()
    with Kept(model) as kept:
        model.base_model.model.model(input_ids=torch.arange(30, 94)[None])
    memory = memory_of_pass(files.architecture, TrainConfig(fast="off"), Load(64, 64), place=Place("cpu", dtype))
    assert kept.bytes == pytest.approx(64 * memory.kept * memory.layers, rel=0.15)


def memory(arch, longest, largest, *, place=GPU, free=80e9, base="full", rows=64, **train):
    load = Load(longest, largest, 0.3, rows, 400)
    return predict_memory(arch, TrainConfig(**train), load, place=place, free=free, base=base)


@pytest.mark.parametrize(("card", "base"), [(23e9, "full"), (12e9, "nf4")])
def test_8b_trains_on_small_cards(card, base):
    """Rows of 2,048 tokens, in bf16 in 23 GB and in nf4 in 12 GB, by recomputing some layers."""
    found = memory(LLAMA3, 2048, 16 * 2048, free=card, base=base)
    assert found.fit.fits and 0 < found.fit.level < 32 and found.fit.micro_tokens >= 2048
    assert 0.8 * card < found.total <= card
    assert not memory(LLAMA3, 2048, 16 * 2048, free=card, base=base, recompute=0).fit.fits
    assert not memory(LLAMA3, 2048, 16 * 2048, free=16e9, base="full").fit.fits


def test_8b_on_a_large_card_needs_no_recomputation():
    """The 36 GB of the goal, with 3,072 tokens a pass."""
    found = memory(LLAMA3, 2048, 3072)
    assert (found.fit.level, found.fit.micro_tokens) == (0, 3072)
    training = found.weights + found.process + found.adapter + found.activations
    assert training == pytest.approx(16.1e9 + 3072 * 32 * 94.4e3 + 0.4e9 + 1e9, rel=0.05)
    assert found.total == training  # evaluation copies no weights of a model this large
    small = [memory(SMOLLM2, 100, 512, free=free, rows=1).evaluation for free in (80e9, 1.5e9)]
    factors = 2 * lora_parameters(SMOLLM2, 8, "all-linear")
    # as it does of a small one where there is room, and else applies the adapter beside them
    assert small[0] - small[1] == 2 * SMOLLM2.linear_parameters - 2.5 * factors
    recomputed = memory(LLAMA3, 2048, 3072, recompute=32)
    assert recomputed.weights + recomputed.process + recomputed.adapter + recomputed.activations < 22e9


def test_memory_adds_up():
    small, large = (memory(SMOLLM2, 100, n, place=CPU, micro_tokens=4096) for n in (1024, 4096))
    assert 2.5 * small.activations < large.activations < 4 * small.activations  # the block of logits is one
    assert small.weights == 2 * SMOLLM2.parameters
    assert large.total == large.weights + large.process + large.adapter + large.activations
    assert memory(SMOLLM2, 100, 10**5, place=CPU).fit.micro_tokens == 3072  # as ever
    many = memory(SMOLLM2, 10, 10, place=CPU, rows=10**4)
    assert many.total == many.weights + many.process + many.evaluation  # keys, values and logits of decoding
    plain = memory(SMOLLM2, 100, 3072, place=CPU, fast="off")
    assert plain.activations > 3 * memory(SMOLLM2, 100, 3072, place=CPU).activations
    unknown = memory(LLAMA3, 100, 10**5, free=None)
    assert (unknown.fit.micro_tokens, unknown.fit.level, unknown.fit.fits) == (3072, 0, True)
    assert unknown.evaluation < LLAMA3.linear_parameters  # no copies of the weights: none this large is merged into
    little = memory(SMOLLM2, 100, 10**4, free=None)
    assert little.evaluation > 2 * SMOLLM2.linear_parameters


def test_memory_of_this_machine_and_its_card(monkeypatch):
    monkeypatch.setattr(machine, "_memory", {})
    total, free = machine.device_memory("cpu")
    assert 0 < free <= total
    answers = iter(["24564, 23000\n", FileNotFoundError()])

    def run(command, **_):
        assert command[1:3] == ["-i", "1"] and "memory.total,memory.free" in command[3]
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine.device_memory("cuda") == (24564 * 2**20, 23000 * 2**20) == machine.device_memory("cuda")
    machine._memory.clear()
    assert machine.device_memory("cuda") is None and machine.device_memory("mps") is None
    assert pass_memory.host_memory()[1] > 0


def test_free_memory_is_that_before_a_model_was_loaded(monkeypatch):
    readings = iter([(24e9, 23e9), (24e9, 22e9), (24e9, 6e9)])
    monkeypatch.setattr(machine, "_memory", {})
    monkeypatch.setattr(machine, "gpu_memory", lambda: next(readings))
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "torch")
        assert [machine.device_memory("cuda")[1] for _ in range(2)] == [23e9, 22e9]  # others come and go
    assert machine.device_memory("cuda")[1] == 22e9 and next(readings)[1] == 6e9  # not asked again


def test_distributions_take_blocks_of_fp32_logits():
    for family, plain in (("llama", 8), ("gemma2", 8 + 4)):
        arch, size = replace(LLAMA3, model_type=family), (1 << 27) // LLAMA3.vocab * LLAMA3.vocab
        blocks = [
            memory_of_pass(arch, TrainConfig(), Load(1, 1, soft=soft), place=GPU).block / size for soft in (True, False)
        ]
        assert blocks == [plain, 2]
        alone = memory_of_pass(arch, TrainConfig(), Load(1, 1), place=CPU).block / (256 * LLAMA3.vocab)
        assert alone == (2 + plain if family == "gemma2" else 2)  # the kernels for CPUs know no cap


def test_copies_of_a_shared_prefix_are_counted_on_a_gpu():
    """16 task rows behind 280 tokens: their keys and values once more, in every layer."""
    load = Load(310, 4960, copied=16 * 280)
    one, other = (memory_of_pass(LLAMA3, TrainConfig(), load, place=place) for place in (GPU, CPU))
    alone = memory_of_pass(LLAMA3, TrainConfig(), Load(310, 4960), place=GPU)
    assert one.copied == 16 * 280 * 4096 and one.kept == alone.kept + 4096 and other.copied == 0
    assert one.peak(760) - alone.peak(760) == pytest.approx((16 * 280 + 760) * 4096 * 32, rel=0.03)


def test_what_an_adapter_takes_on_a_card():
    """A copy in the model's format wherever the adapter is one tensor, in fp32 as well; none on the plain path."""
    numbers = {"bf16": 18, "fp32": 20}
    for dtype, each in numbers.items():
        found = memory(SMOLLM2, 100, 1000, place=Place("cuda", dtype))
        assert found.adapter == each * memory(SMOLLM2, 100, 1000, place=CPU).adapter / 16
    assert memory(SMOLLM2, 100, 1000, fast="off").adapter == memory(SMOLLM2, 100, 1000, place=CPU).adapter


def test_small_models_on_a_card_hold_a_pass_twice(monkeypatch):
    """In the memory of CUDA graphs too; not where no passes are replayed."""
    monkeypatch.setattr(machine, "gpu", lambda: ("H100", 9.0))
    found = memory(SMOLLM2, 100, 2000)
    assert found.graphs == found.activations and found.total > found.weights + 2 * found.activations
    others = [{"neftune_alpha": 5.0}, {"fast": "off"}, {"recompute": 30}, {"place": Place("cuda", "fp32")}]
    assert not any(memory(SMOLLM2, 100, 2000, **given).graphs for given in others)
    assert memory(LLAMA3, 100, 2000).graphs == 0 == memory(SMOLLM2, 100, 2000, place=CPU).graphs
    monkeypatch.setattr(machine, "gpu", lambda: ("Tesla T4", 7.5))
    assert memory(SMOLLM2, 100, 2000, place=Place("cuda", "fp16")).graphs == 0
