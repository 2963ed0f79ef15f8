"""One tensor for all adapters: the same training and checkpoints, constant addresses, gradients without copies."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tell.errors import Interrupted
from tell.kernels import draws
from tell.train import flat as flats
from tell.train import trainer as trainers
from tell.train.fast.stacked import Lora, Stack
from tell.train.flat import FlatAdapters, add_product, joined_rows, slot_of, sums_in_fp32
from tell.train.lora import a_scales, add_lora
from tell.train.parallel import Processes
from tell.train.step import Body, StepRules, step_loss
from tell.train.trainer import Trainer
from tell.train.training_job import TrainingHooks, TrainingJob
from tell.train.update import Update
from train.packed import Fetches, assert_close, gradients, load, make_rows, wake
from train.test_trainer import CONFIG, adapter, equal, log, mixture_of, trainer

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
EVEN = CONFIG.model_copy(update={"lora_dropout": 0.0, "weight_decay": 0.1, "max_grad_norm": 0.5})


def flattened(model, dtype=torch.float32) -> FlatAdapters:
    return FlatAdapters({n: p for n, p in model.named_parameters() if p.requires_grad}, a_scales(model), dtype)


@pytest.fixture
def forced(monkeypatch):
    """Flat on the CPU, too."""
    monkeypatch.setattr(trainers, "FLAT_DEVICES", ("cpu", "cuda"))


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_parameters_are_views_and_joined_layers_follow_each_other(family, tiny_model):
    model = add_lora(load(tiny_model(family)), CONFIG, seed=1)
    wake(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    flat = flattened(model, torch.bfloat16)
    first, last = flat.weight.data_ptr(), flat.weight.data_ptr() + flat.weight.nbytes
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert named.keys() == before.keys()
    for name, p in named.items():
        assert torch.equal(p, before[name]) and first <= p.data_ptr() < last
        slot = slot_of(p)
        assert slot.grad.data_ptr() == p.grad.data_ptr() and slot.scale == (8.0 if "lora_A" in name else 1.0)
        assert torch.equal(slot.shadow, (before[name] * slot.scale).bfloat16())
    spans = sorted(flat.spans.values())
    assert all(a[1] <= b[0] for a, b in pairwise(spans))  # no two overlap
    assert len(flat._casts) == 2  # A times its scale, and B
    groups = (
        [("gate_up_proj",), ("qkv_proj",)]
        if family == "phi3"
        else [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    )
    for names in groups:
        parts = [
            p for n, p in named.items() if "layers.1." in n and "lora_A" in n and any(f".{x}." in n for x in names)
        ]
        assert len(parts) == len(names)
        for tensors in (parts, [slot_of(p).shadow for p in parts], [p.grad for p in parts]):
            whole = joined_rows(tensors)
            assert (
                torch.equal(whole, torch.cat([t.detach() for t in tensors]))
                and whole.data_ptr() == tensors[0].data_ptr()
            )


def test_what_is_not_adjacent_is_no_view():
    a, b = torch.zeros(6, 4).split(3)
    assert joined_rows([a, b]).shape == (6, 4) and joined_rows([b, a]) is None
    assert joined_rows([torch.zeros(3, 4), torch.zeros(3, 4)]) is None
    assert joined_rows([a, torch.zeros(6, 2)]) is None and joined_rows([a, torch.zeros(6, 4)[3:]]) is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_added_to_an_fp32_total(device, dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(64, n, device=device).to(dtype) for n in (4, 8))
    whole = torch.ones(9, 8, device=device)
    total = whole[3:7]
    add_product(total, a.t(), b, 0.5)
    exact = 1 + 0.5 * a.double().t() @ b.double()
    rounded = dtype != torch.float32 and not sums_in_fp32(a.device, dtype)
    torch.testing.assert_close(total.double(), exact, rtol=1e-2 if rounded else 1e-5, atol=5e-2 if rounded else 1e-5)
    assert whole[:3].eq(1).all() and whole[7:].eq(1).all()
    assert not rounded or device == "cpu"


@pytest.mark.parametrize("refused", [(), ("addmm",), ("addmm", "mm")])
def test_products_are_summed_the_first_way_that_torch_takes(refused, monkeypatch):
    """By stand-ins of the products with an fp32 result, which a CPU lacks: torch 2.10, 2.8 and older ones."""
    called = []

    def taken(name, compute):
        def product(*args, out_dtype, **options):
            if name in refused:
                raise RuntimeError("expected self and mat2 to have the same dtype")
            called.append(name)
            return compute(*args, **options)

        monkeypatch.setattr(torch, name, product)

    def addmm(total, a, b, *, alpha, out):
        assert out is total
        return total.add_(a.float() @ b.float(), alpha=alpha)

    taken("addmm", addmm)
    taken("mm", lambda a, b: a.float() @ b.float())
    add = flats._exact.__wrapped__(torch.device("cpu"), torch.bfloat16)
    assert called == [name for name in ("addmm", "mm") if name not in refused][:1]
    assert (add is None) == (len(refused) == 2)
    if add is not None:
        a, b = torch.randn(4, 64).bfloat16(), torch.randn(64, 8).bfloat16()
        total = torch.ones(4, 8)
        add(total, a, b, 0.5)
        torch.testing.assert_close(total.double(), 1 + 0.5 * a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_memory_that_ends_says_nothing_about_a_product(monkeypatch):
    """It is raised, and the way is tried again another time."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    device = torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "addmm", full)
        with pytest.raises(torch.OutOfMemoryError):
            flats._exact(device, torch.bfloat16)
    monkeypatch.setattr(torch, "addmm", lambda total, a, b, alpha, out, **_: total.add_(a.float() @ b.float() * alpha))
    assert flats._exact.__wrapped__(device, torch.bfloat16) is flats._added_in_place


def test_a_product_that_is_rounded_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: (a.float() @ b.float()).to(a.dtype).float())
    monkeypatch.setattr(torch, "addmm", lambda total, a, b, out_dtype, alpha, out: total.add_(a @ b, alpha=alpha))
    assert flats._exact.__wrapped__(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 200])
@torch.no_grad()
def test_adapters_of_joined_layers_without_copies(dtype, tokens, monkeypatch):
    """Outputs and gradients of three layers over one input, one of them without an adapter."""
    monkeypatch.setattr("tell.train.fast.stacked.products_for", lambda x: None)  # as on a GPU
    torch.manual_seed(0)
    widths, k = (8, 4, 4), 16
    stack = Stack(torch.randn(16, k).to(dtype), torch.randn(16).to(dtype), widths, (2.0, None, 2.0), 0.0)
    names = ["m.q.lora_A.w", "m.q.lora_B.w", "m.v.lora_A.w", "m.v.lora_B.w"]
    shapes = [(2, k), (8, 2), (3, k), (4, 3)]
    plain = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    joined = [torch.nn.Parameter(p.detach().clone()) for p in plain]
    flat = FlatAdapters(dict(zip(names, joined, strict=True)), {names[0]: 2.0, names[2]: 2.0}, dtype)
    x, gy = torch.randn(tokens, k).to(dtype), torch.randn(tokens, 16).to(dtype)
    found = []
    for adapters in (plain, joined):
        lora = Lora(stack, adapters, x)
        y, u = lora.forward(x)
        gx, gu = lora.input_gradient(gy)
        torch.testing.assert_close(lora.inner_gradient(gy), gu, rtol=1e-2, atol=1e-2)
        found.append((y, gx, lora.adapter_gradients(x, gy, u, gu)))
    (y, gx, grads), (flat_y, flat_gx, none) = found
    assert none == [None] * 4
    assert lora.a.data_ptr() == flat.shadow.data_ptr()  # neither copied nor cast
    near = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
    torch.testing.assert_close(flat_y, y, **near)
    torch.testing.assert_close(flat_gx, gx, **near)
    for p, grad in zip(joined, grads, strict=True):
        torch.testing.assert_close(p.grad, grad.float(), **near)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_step_are_those_of_single_parameters(family, kernels, dtype, tiny_model, monkeypatch):
    if not kernels:  # as on a GPU: no compiled products, so gradients go straight into the flat tensor
        monkeypatch.setattr("tell.train.fast.stacked.products_for", lambda x: None)
    results = []
    for joined in (False, True):
        model = add_lora(load(tiny_model(family), dtype=dtype), EVEN, seed=1)
        wake(model)
        flat = flattened(model, dtype) if joined else None
        body = Body(model)
        loss = step_loss(body, make_rows((40, 30, 20, 12)), StepRules("example", micro_tokens=70)).loss
        results.append((loss, gradients(model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6 if dtype == torch.float32 else 1e-2)
    assert_close(results[1][1], results[0][1], 1e-5 if dtype == torch.float32 else 0.05)
    assert flat.grad.norm() > 0


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.2}, {"average": 0.5, "adapter_scale": 0.5}])
def test_flat_training_equals_that_of_single_parameters(settings, tiny_model, tmp_path, monkeypatch):
    config = EVEN.model_copy(update=settings)
    model = load(tiny_model("llama"))
    trainer(model, tmp_path / "single", config).run()
    monkeypatch.setattr(trainers, "FLAT_DEVICES", ("cpu",))
    trainer(model, tmp_path / "flat", config).run()
    single, flat = log(tmp_path / "single"), log(tmp_path / "flat")
    assert len(single) == 5
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[key] for r in flat], [r[key] for r in single], rtol=1e-4)
    assert_close(adapter(tmp_path / "flat"), adapter(tmp_path / "single"), 1e-3)


def test_addresses_stay_for_the_whole_run(forced, tiny_model, tmp_path, monkeypatch):
    made, seen = [], []

    class Watched(FlatAdapters):
        def __init__(self, parameters, *args):
            super().__init__(parameters, *args)
            made.append((self, parameters))

    def look(report):
        flat, parameters = made[0]
        inner = [x.data_ptr() for p in parameters.values() for x in (p, p.grad, slot_of(p).shadow)]
        seen.append(
            [flat.weight.data_ptr(), flat.weight.grad.data_ptr(), flat.grad.data_ptr(), flat.shadow.data_ptr(), *inner]
        )
        for p in parameters.values():  # the cast copy is that of the weights after the step
            slot = slot_of(p)
            assert torch.equal(slot.shadow, p.detach() * slot.scale) and not p.grad.any()

    monkeypatch.setattr(trainers, "FlatAdapters", Watched)
    trainer(load(tiny_model("llama")), tmp_path, EVEN, progress=look).run()
    assert len(made) == 1 and len(seen) == 5 and all(addresses == seen[0] for addresses in seen)


@pytest.mark.parametrize("begins", ["single", "flat"])
@pytest.mark.parametrize("ends", ["single", "flat"])
def test_either_form_resumes_what_the_other_wrote(begins, ends, tiny_model, tmp_path, monkeypatch):
    model = load(tiny_model("qwen3"))
    config = EVEN.model_copy(update={"average": 1.0})

    def use(form):
        monkeypatch.setattr(trainers, "FLAT_DEVICES", ("cpu",) if form == "flat" else ())

    use(ends)
    trainer(model, tmp_path / "whole", config).run()
    use(begins)
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        trainer(model, tmp_path / "cut", config, stopped=lambda: next(asked)).run()
    state = load_file(tmp_path / "cut" / "adapter" / "checkpoint" / "state.safetensors")
    assert sum(name.startswith("exp_avg_sq/") for name in state) == sum(name.startswith("weight/") for name in state)
    use(ends)
    trainer(model, tmp_path / "cut", config).run(resume=True)
    if begins == ends:
        assert equal(adapter(tmp_path / "cut"), adapter(tmp_path / "whole"))  # to the bit
    assert_close(adapter(tmp_path / "cut"), adapter(tmp_path / "whole"), 1e-3)


def test_the_format_of_a_checkpoint_is_that_of_single_parameters(tiny_model, tmp_path, monkeypatch):
    model, shapes = load(tiny_model("llama")), []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(trainers, "FLAT_DEVICES", devices)
        with pytest.raises(Interrupted):
            trainer(model, tmp_path, EVEN, stopped=lambda: True).run()
        state = load_file(tmp_path / "adapter" / "checkpoint" / "state.safetensors")
        shapes.append({name: (value.shape, value.dtype) for name, value in state.items()})
    assert shapes[0] == shapes[1]


def test_a_parameter_without_gradient_has_no_state_in_an_old_checkpoint(tiny_model):
    from tell.train.checkpoint import load_state, state_tensors

    model = add_lora(load(tiny_model("llama")), EVEN, seed=1)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    single = torch.optim.AdamW(named.values(), lr=0.1)
    idle = next(iter(named))
    for name, p in named.items():
        p.grad = None if name == idle else torch.ones_like(p)
    single.step()
    tensors = state_tensors(named, single)
    assert f"step/{idle}" not in tensors
    flat = flattened(model)
    optimizer = torch.optim.AdamW([flat.weight], lr=0.1, fused=True)
    load_state(tensors, named, optimizer, flat)
    again = state_tensors(named, optimizer, flat)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert not again[f"exp_avg/{idle}"].any() and float(again[f"step/{idle}"]) == 1


def test_the_device_decides(tiny_model, tmp_path, monkeypatch):
    """On a CPU, and on the plain path, single parameters."""
    made = []
    monkeypatch.setattr(trainers, "FlatAdapters", lambda *args: made.append(args) or FlatAdapters(*args))
    trainer(load(tiny_model("llama")), tmp_path / "a").run()
    monkeypatch.setattr(trainers, "FLAT_DEVICES", ("cpu",))
    trainer(load(tiny_model("llama")), tmp_path / "b", CONFIG.model_copy(update={"fast": "off"})).run()
    assert flats.FLAT_DEVICES == ("cuda",) and not made


def test_rounded_gradients_are_said(forced, tiny_model, tmp_path):
    notes = []
    tables, mixture = mixture_of()
    job = TrainingJob(tables, mixture, EVEN, 7, tmp_path / "adapter", tmp_path / "logs" / "tell.jsonl")
    model = load(tiny_model("llama"), dtype=torch.bfloat16)
    Trainer(model, job, hooks=TrainingHooks(note=notes.append)).run()
    assert any("adapters' gradients are rounded to torch.bfloat16" in note for note in notes)
    assert json.loads((tmp_path / "logs" / "tell.jsonl").read_text().splitlines()[-1])["step"] == 5


def test_gradients_of_several_processes_are_summed_in_place(tiny_model, monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda sums: sums.mul_(2))
    model = add_lora(load(tiny_model("llama")), EVEN, seed=1)
    flat = flattened(model)
    flat.grad.fill_(3.0)
    Processes.add_gradients(object.__new__(Processes), [flat.weight])
    assert flat.weight.grad is flat.grad and flat.grad.eq(6).all()
    assert all(g.eq(6).all() for g in gradients(model).values())


def test_the_seed_on_a_gpu_is_refilled_in_place(monkeypatch):
    """By a stand-in: the CPU's tensor under the GPU's name, and no pinned memory."""
    monkeypatch.setattr(draws, "_seeds", {torch.device("cuda", 0): torch.zeros(1, dtype=torch.int32)})
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    seed, seen = draws.device_seed(torch.device("cuda", 0)), []
    for _ in range(2):
        torch.manual_seed(3)
        for _ in range(2):
            draws.draw_seed(torch.device("cuda", 0))
            seen.append(int(seed))
    assert seen[0] == seen[2] and seen[1] == seen[3] and seen[0] != seen[1] and min(seen) >= 0
    state = torch.get_rng_state()
    draws.draw_seed(torch.device("cpu"))  # leaves the numbers of a CPU run as they were
    assert torch.equal(torch.get_rng_state(), state)
    assert draws.device_seed(torch.device("cpu")) is draws.device_seed(torch.device("cpu"))


def test_a_step_launches_less(tiny_model, monkeypatch):
    """Operations of two layers' pass and of the update, as on a GPU: none of them a cast of one matrix."""
    monkeypatch.setattr("tell.train.fast.stacked.products_for", lambda x: None)
    counts, updates = [], []
    for joined in (False, True):
        model = add_lora(load(tiny_model("llama"), dtype=torch.bfloat16), EVEN, seed=1)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        update = Update(named, EVEN, torch.bfloat16, flattened(model, torch.bfloat16) if joined else None)
        body, rows = Body(model), make_rows((40, 30))
        for counted in (False, True):  # the optimizer makes its state in the first step
            with Fetches() as passes:
                step_loss(body, rows, StepRules())
            with Fetches() as after:
                update.clip()
                update.apply(1e-3, torch.zeros(()))
            if counted:
                counts.append(passes.operations)
                updates.append(after.operations)
                assert after.names == []
    assert len(named) == 28
    assert counts[1] < counts[0] - 2 * len(named)
    assert updates[1] <= 20  # a handful, however many layers
