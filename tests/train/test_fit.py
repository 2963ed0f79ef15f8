"""Passes and recomputation by free memory, and steps that run out of memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tell.config import make_config
from tell.config_sections import TrainConfig
from tell.errors import TellError
from tell.kernels import draws
from tell.pass_memory import MICRO_TOKENS, PassMemory, grow_segments, loss_block
from tell.run import claim
from tell.studies.cells import make_cell
from tell.train import fit as fits
from tell.train.fit import FittedStep, count_pass, fit_step, is_out_of_memory
from tell.train.lora import add_lora
from tell.train.loss import block_size
from tell.train.plain import PlainBody
from tell.train.recompute import recomputed_layers
from tell.train.step import Body, StepRules, step_loss
from tell.train.training_job import run_digest
from tell.train.update import Update
from train.packed import gradients, load, make_rows, wake
from train.test_trainer import CONFIG, adapter, log, mixture_of, trainer

MEMORY = PassMemory(layers=32, kept=110e3, entry=8e3, rest=16e3, block=0.27e9)


@given(free=st.floats(1e6, 1e11), level=st.integers(0, 32))
def test_the_largest_pass_fits_and_no_larger_one(free, level):
    tokens = MEMORY.most_tokens(free, level)
    assert tokens == 0 or MEMORY.peak(tokens, level) <= free * (1 + 1e-9)
    assert MEMORY.peak(tokens + 1, level) > free
    assert level in (0, 32) or MEMORY.most_tokens(free, level - 1) <= tokens  # the last layer is never kept for long


def test_recomputation_comes_before_small_passes():
    """All of a step at once where it fits, then as few layers as let 2,048 tokens in, then smaller passes."""
    rows = {"longest": 700, "largest": 3000}
    plenty, less, little = (MEMORY.choose(free, **rows) for free in (40e9, 6e9, 0.9e9))
    assert (plenty.micro_tokens, plenty.level, plenty.fits) == (3000, 0, True)
    assert less.micro_tokens >= 2048 and 0 < less.level < 32 and less.fits
    assert MEMORY.most_tokens(6e9, less.level - 1) < 2048
    assert 700 <= little.micro_tokens < 2048 and little.level >= 31 and little.fits
    none = MEMORY.choose(0.3e9, **rows)
    assert (none.micro_tokens, none.fits) == (700, False) and none.level >= 31
    assert MEMORY.choose(400e9, longest=700, largest=10**6).micro_tokens == 16_384
    given_size = MEMORY.choose(6e9, **rows, micro=3072)
    assert given_size.micro_tokens == 3072 and given_size.level > less.level
    off = MEMORY.choose(6e9, **rows, level=0)
    assert off.level == 0 and off.micro_tokens < 2048 and off.fits
    assert MEMORY.choose(6e9, longest=2900, largest=3000).micro_tokens >= 2900  # a row is never split


def test_blocks_are_those_of_the_loss():
    for vocabulary in (49_152, 128_256, 10**6):
        for device in ("cpu", "cuda"):
            rows = block_size(torch.device(device), vocabulary)
            assert loss_block(device, vocabulary, width=2, fused=True) == rows * vocabulary * 2


def test_segments_grow_unless_the_user_has_said_how():
    fresh: dict[str, str] = {}
    grow_segments(fresh)
    assert fresh == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        own = {name: "max_split_size_mb:128"}
        grow_segments(own)
        assert own == {name: "max_split_size_mb:128"}


class Device:
    """A step that runs out of memory in a pass of more than ``room(level)`` tokens, after it has spoilt something."""

    def __init__(self, body, recompute, room, step=step_loss):
        self.body, self.recompute, self.room, self.step = body, recompute, room, step
        self.tried = []

    def __call__(self, rows, *, rules, clip=None, total=None):
        self.tried.append((rules.micro_tokens, self.recompute.level))
        tokens = max(max(len(row.ids) for row in rows), min(rules.micro_tokens, sum(len(row.ids) for row in rows)))
        if tokens > self.room(self.recompute.level):
            torch.randn(3)
            self.step(self.body, rows[:1], rules)  # leaves gradients
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.step(self.body, rows, rules, clip=clip, total=total)


def tuned(folder, **settings):
    model = add_lora(base := load(folder), TrainConfig(lora_r=4, **settings), seed=3)
    wake(model)
    return base, model


def fitted(model, device, recompute, rules, *, raises=True, notes=None):
    return FittedStep(
        device, rules, recompute, raises=raises, sources=["task", "general"],
        clear=lambda: model.zero_grad(set_to_none=True), note=(notes if notes is not None else []).append,
    )  # fmt: skip


def test_a_step_that_runs_out_of_memory_is_repeated_with_the_same_result(tiny_model, monkeypatch):
    monkeypatch.setattr(fits, "SMALL_PASS", 100)
    base, model = tuned(tiny_model("llama"), lora_dropout=0.0)
    body, rows, notes = Body(model), make_rows([60, 50, 40, 30, 20]), []
    rules = StepRules("example", micro_tokens=3072)
    with recomputed_layers(base) as layers:
        torch.manual_seed(1)
        expected = step_loss(body, rows, rules)
        slopes, after = gradients(model), torch.get_rng_state()
        model.zero_grad(set_to_none=True)
        device = Device(body, layers, lambda level: (0, 70, 100)[level])
        torch.manual_seed(1)
        step = fitted(model, device, layers, rules, notes=notes)
        out = step(rows)
    # 200 tokens, halved to 100, then one layer of two, two layers
    assert device.tried == [(3072, 0), (100, 0), (100, 1), (100, 2)]
    assert out.loss == pytest.approx(expected.loss, rel=1e-6) and torch.equal(torch.get_rng_state(), after)
    for name, slope in gradients(model).items():
        torch.testing.assert_close(slope, slopes[name], atol=1e-6, rtol=1e-4)
    assert len(notes) == 3 and "100 tokens, 0 of 2 layers" in notes[0] and "2 of 2" in notes[2]
    assert len(device.tried) == 4 and step(rows) and device.tried[-1] == (100, 2)  # the next step need not find out


def test_dropout_draws_the_same_masks_in_a_repeated_step(tiny_model, monkeypatch):
    """Exactly: only the level changes, which changes no number."""
    monkeypatch.setattr(fits, "SMALL_PASS", 10**6)
    base, model = tuned(tiny_model("llama"), lora_dropout=0.4)
    body, rows, rules = Body(model), make_rows([60, 50, 40]), StepRules(micro_tokens=60)
    found = []
    with recomputed_layers(base) as layers:
        for room in (lambda level: 10**6, lambda level: 10**6 * (level > 0)):
            torch.manual_seed(4)
            out = fitted(model, Device(body, layers, room), layers, rules)(rows)
            found.append((out.loss, gradients(model)))
            model.zero_grad(set_to_none=True)
        assert layers.level == 1
    assert found[0][0] == found[1][0] and all(torch.equal(found[0][1][n], g) for n, g in found[1][1].items())


def test_a_repeated_step_draws_by_the_same_seed_of_its_device(monkeypatch):
    """Which passes refill; in place, since captured graphs read it there."""
    seed, seen = torch.tensor([7]), []
    monkeypatch.setattr(draws, "_seeds", {torch.device("cuda", 0): seed})

    def step(rows, *, rules, **_):
        seen.append(int(seed))
        seed.fill_(9)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    layers = SimpleNamespace(level=0, layers=[None])
    FittedStep(step, StepRules(), layers, raises=True, sources=["task"], clear=lambda: None, note=print)(make_rows([9]))
    assert seen == [7, 7]


def test_a_step_that_runs_out_of_memory_in_clipping_is_unscaled_again():
    """fp16: its gradients were unscaled once already."""
    parameter = torch.nn.Parameter(torch.ones(3))
    update = Update({"a": parameter}, TrainConfig(learning_rate=0.1), torch.float16)
    for _ in range(2):
        parameter.grad = torch.full((3,), 4096.0)
        assert float(update.clip()) == pytest.approx(3**0.5)
        update.clear()
    assert parameter.grad is None


def test_a_row_that_fits_in_no_way_is_named(tiny_model):
    base, model = tuned(tiny_model("llama"), lora_dropout=0.0)
    body, rows = Body(model), make_rows([60, 50, 40], task=(0,))
    with recomputed_layers(base) as layers:
        device = Device(body, layers, lambda level: 10)
        with pytest.raises(TellError) as caught:
            fitted(model, device, layers, StepRules(micro_tokens=90))(rows)
        assert device.tried[-1] == (60, 2)
        assert (
            "60 tokens" in str(caught.value) and "task rows" in str(caught.value) and "max_length" in str(caught.value)
        )
        layers.level = 0
        with pytest.raises(TellError, match="recompute=auto"):
            fitted(model, device, layers, StepRules(micro_tokens=90), raises=False)(rows)
        assert layers.level == 0


def test_other_errors_pass():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))

    def broken(rows, **_):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        FittedStep(broken, StepRules(), None, raises=True, sources=[], clear=print, note=print)([])


@pytest.mark.parametrize("fast", [True, False])
def test_counted_bytes_are_those_of_a_longer_pass(fast, tiny_model):
    """What 32 tokens keep per token is what many short rows keep; layers add up to the whole."""
    base = load(tiny_model("llama"))
    model = add_lora(base, TrainConfig(lora_dropout=0.0, lora_r=4), seed=3, fused=fast)
    body = Body(model) if fast else PlainBody(model)
    with recomputed_layers(base) as layers:
        few, many = (count_pass(body, layers, lengths=rows) for rows in ([32], [40] * 4))
        assert layers.watch is None and layers.level == 0
    assert few.layers == 2 and few.entry == 64 * 4
    assert few.kept == pytest.approx(many.kept, rel=0.15 if fast else 0.4)  # attention in blocks keeps squares
    assert (few.block > 0) == fast and (few.rest > 512 * 12) == (not fast)


def test_rows_of_a_probe():
    assert fits._probe_lengths(150, 512) == [150] * 3
    assert fits._probe_lengths(2048, 512) == [512] and fits._probe_lengths(1, 4) == [1] * 4


def test_neither_key_names_a_run_or_a_cell():
    """Results do not depend on them."""
    _, mixture = mixture_of()
    config = make_config({"model": {"name": "x"}, "task": {"data": "y"}})
    names, digests = set(), set()
    for micro, level in ((None, None), (512, 3), (3072, 0)):
        train = CONFIG.model_copy(update={"micro_tokens": micro, "recompute": level})
        digests.add(run_digest(train, mixture, 7))
        config.train.micro_tokens, config.train.recompute = micro, level
        names.add(make_cell(config, "tell").name)
        assert claim._changed(config, make_config({"model": {"name": "x"}, "task": {"data": "y"}}), False) is None
    assert len(names) == len(digests) == 1


def job_of(tmp_path, model, **settings):
    return trainer(model, tmp_path, CONFIG.model_copy(update=settings)).job


def test_on_a_gpu_passes_and_level_follow_from_free_memory(tiny_model, tmp_path, monkeypatch):
    """The decision for a device called cuda."""
    base, model = tuned(tiny_model("gemma2"), lora_dropout=0.0)
    body, memory = Body(model), PassMemory(layers=3, kept=1e6, entry=1e4, rest=0.0, block=0.0)
    monkeypatch.setattr(fits, "device_of", lambda body: torch.device("cuda"))
    monkeypatch.setattr(fits, "count_pass", lambda *_, **__: memory)
    monkeypatch.setattr(fits, "flash_refusal", lambda model: "the model caps its attention scores")
    job = job_of(tmp_path, base, micro_tokens=None)
    lengths = job.mixture.column("tokens")
    largest, longest = max(int(lengths[i : i + 4].sum()) for i in range(0, len(lengths), 4)), int(lengths.max())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    notes = []
    with recomputed_layers(base) as layers:

        def chosen(free, job=job, rules=None):
            monkeypatch.setattr(fits, "free_bytes", lambda device: (free * 1.001 + 14 * trained + 0.2e9) / 0.95)
            step = fit_step(None, body, layers, rules or StepRules(), job, clear=print, note=notes.append)
            level, layers.level = layers.level, 0
            return step.rules.micro_tokens, level

        assert chosen(1e12) == (largest, 0)
        assert chosen(memory.peak(largest, 1)) == (largest, 1)
        assert chosen(memory.peak(longest + 1, 2)) == (longest + 1, 2) and "may not" not in notes[-1]
        assert chosen(memory.peak(longest, 2) * 0.9) == (longest, 2) and "may not suffice" in notes[-1]
        assert "0 of 3 layers recomputed" in notes[0] and "GB that are free" in notes[0]
        own = job_of(tmp_path, base, micro_tokens=50, recompute=0), StepRules(micro_tokens=50)
        assert chosen(1e3, *own) == (50, 0) and len(notes) == 4  # as the user says, and without a word


def fit_on_a_gpu(model, base, tmp_path, monkeypatch, *, free, refusal=None, **settings):
    """The choice for a device called cuda, with layers that keep a megabyte a token."""
    memory = PassMemory(layers=3, kept=1e6, entry=1e4, rest=0.0, block=0.0)
    monkeypatch.setattr(fits, "device_of", lambda body: torch.device("cuda"))
    monkeypatch.setattr(fits, "count_pass", lambda *_, **__: memory)
    monkeypatch.setattr(fits, "flash_refusal", lambda model: refusal)
    monkeypatch.setattr(fits, "free_bytes", lambda device: (free + 0.2e9) / 0.95 + 1e6)
    job = job_of(tmp_path, base, micro_tokens=None, **settings)
    with recomputed_layers(base) as layers:
        return memory, fits.choose_fit(Body(model), layers, job, share_prefix=True)


def test_graphs_hold_a_pass_once_more(tiny_model, tmp_path, monkeypatch):
    base, model = tuned(tiny_model("llama"), lora_dropout=0.0)
    peak = 3.75e6 * 100  # of all layers over 100 tokens
    given = model, base, tmp_path, monkeypatch
    _, free = fit_on_a_gpu(*given, free=1e12)
    assert free.level == 0
    _, alone = fit_on_a_gpu(*given, free=peak, refusal="the GPU is older than Ampere", recompute=0)
    _, graphed = fit_on_a_gpu(*given, free=peak, recompute=0)
    assert alone.micro_tokens > graphed.micro_tokens and graphed.bytes < 0.51 * peak < alone.bytes
    _, noisy = fit_on_a_gpu(*given, free=peak, recompute=0, neftune_alpha=5.0)
    assert noisy == alone


def test_between_graphs_and_none_recomputation_decides():
    rows = {"longest": 2048, "largest": 2048}
    whole = MEMORY.peak(2048)
    assert MEMORY.choose(2 * whole, **rows, graphs=True).level == 0
    between = MEMORY.choose(1.1 * whole, **rows, graphs=True)
    assert between.level > 0 and between.bytes < whole / 1.8  # else a graph would be captured beside it
    short = MEMORY.choose(0.5 * whole, **rows, graphs=True)
    assert short == MEMORY.choose(0.5 * whole, **rows)  # layers are recomputed: no graphs


@given(copied=st.integers(1, 10_000), free=st.floats(1e8, 1e11), level=st.integers(0, 32))
def test_copies_of_a_prefix_take_room_in_every_layer(copied, free, level):
    with_copies = MEMORY.copying(copied, 4096.0)
    more = 4096.0 * (1000 + copied)  # the pass's own keys and values are copied too
    assert with_copies.peak(1000, 0) - MEMORY.peak(1000, 0) == pytest.approx(32.75 * more, rel=0.1)
    tokens = with_copies.most_tokens(free, level)
    assert tokens == 0 or with_copies.peak(tokens, level) <= free * (1 + 1e-9)
    assert with_copies.peak(tokens + 1, level) > free and MEMORY.copying(0, 4096.0) == MEMORY


def test_on_a_cpu_nothing_changes_unless_memory_demands_it(tiny_model, tmp_path, monkeypatch):
    base, model = tuned(tiny_model("gemma2"), lora_dropout=0.0)
    body, job, notes = Body(model), job_of(tmp_path, base, micro_tokens=None), []
    counts = []
    monkeypatch.setattr(fits, "count_pass", lambda *args, **kwargs: counts.append(1) or count_pass(*args, **kwargs))
    with recomputed_layers(base) as layers:
        step = fit_step(None, body, layers, StepRules(), job, clear=print, note=notes.append)
        assert (step.rules, layers.level, notes, counts) == (StepRules(micro_tokens=MICRO_TOKENS), 0, [], [])
        monkeypatch.setattr(fits, "free_bytes", lambda device: 2.6e6)
        step = fit_step(None, body, layers, StepRules(), job, clear=print, note=notes.append)
        assert layers.level > 0 and step.rules.micro_tokens <= MICRO_TOKENS and counts and len(notes) == 1


def test_a_run_short_of_memory_ends_with_the_same_adapter(tiny_model, tmp_path, monkeypatch):
    """The whole loop: its second step runs out of memory once."""
    config = CONFIG.model_copy(update={"lora_dropout": 0.0, "micro_tokens": None})
    trainer(load(tiny_model("llama")), tmp_path / "plain", config).run()
    calls, notes, whole = [], [], FittedStep.__init__

    def short(self, step, *args, **kwargs):
        def once(rows, **options):
            calls.append(options["rules"].micro_tokens)
            if len(calls) == 2:
                step(rows, **{**options, "clip": None})
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return step(rows, **options)

        whole(self, once, *args, **kwargs)

    monkeypatch.setattr(fits, "SMALL_PASS", 1)
    monkeypatch.setattr(FittedStep, "__init__", short)
    trainer(load(tiny_model("llama")), tmp_path / "short", config, note=notes.append).run()
    assert calls[2] < calls[1] == MICRO_TOKENS and len(notes) == 1
    assert [row["loss"] for row in log(tmp_path / "short")] == pytest.approx(
        [r["loss"] for r in log(tmp_path / "plain")]
    )
    for name, value in adapter(tmp_path / "plain").items():
        torch.testing.assert_close(adapter(tmp_path / "short")[name], value, atol=2e-4, rtol=1e-2)


def test_a_recomputed_run_is_the_same_run(tiny_model, tmp_path):
    """Exactly, dropout included; a checkpoint of one resumes as the other."""
    for level in (0, 2):
        config = CONFIG.model_copy(update={"recompute": level})
        trainer(load(tiny_model("llama")), tmp_path / str(level), config).run()
    found = [adapter(tmp_path / name) for name in "02"]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
