"""Dropout through graphs and after a resume: the path of a GPU over CPU tensors, whose replays draw nothing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tell.config_sections import TrainConfig
from tell.errors import Interrupted
from tell.kernels import ops
from tell.kernels.draws import device_seed
from tell.kernels.ops import CKernels, kernels_for
from tell.kernels.triton_ops import TritonKernels
from tell.mix.mixture import build
from tell.train import step, trainer
from tell.train.fast import fused
from tell.train.fast.cuda import Forwards
from tell.train.fast.fused_forwards import mlp_forward, norm_forward
from tell.train.fast.fused_ops import Projection, RmsNorm, _norm_of
from tell.train.fast.stacked import Lora, Stack
from tell.train.flat import FlatAdapters
from tell.train.graphs import PassGraphs
from tell.train.training_job import TrainingHooks, TrainingJob
from train.packed import load, make_rows, make_table
from train.test_graphs import find, sequences  # noqa: F401  (a fixture)


class Shifted(CKernels, TritonKernels):
    """The kernels of a CPU where those of a GPU are expected, with their shift of the masks: interpreted they crawl."""

    def __init__(self, own):
        vars(self).update(vars(own))

    def dropout(self, x, y, p, seed, *, add=False):
        super().dropout(x, y, p, (seed + int(device_seed(x.device))) % 2**32, add=add)


def no_attention(*args):
    raise NotImplementedError


@pytest.fixture(autouse=True)
def gpu_path(monkeypatch):
    """Attention is the model's own."""
    own = kernels_for(torch.ones(1))
    monkeypatch.setitem(ops.BACK_ENDS, "cpu", lambda x: Shifted(own))
    monkeypatch.setattr("tell.train.fast.stacked.products_for", lambda x: None)
    monkeypatch.setattr(fused, "forwards_for", lambda weight: Forwards(norm_forward, no_attention, mlp_forward))
    yield
    device_seed(torch.device("cpu")).zero_()


class Baked:
    """Captures by remembering the work and what the host would draw in it: replays draw the same, and move nothing."""

    def warm(self, work):
        work()

    def capture(self, work):
        state = torch.get_rng_state()

        def replay():
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                work()

        return replay


def test_a_resumed_run_drops_what_the_whole_one_drops(tiny_model, tmp_path, sequences, monkeypatch):  # noqa: F811
    def draw(device):
        device_seed(device).copy_(torch.randint(2**31 - 1, (1,), dtype=torch.int32))

    for module in (step, trainer):
        monkeypatch.setattr(module, "draw_seed", draw)
    monkeypatch.setattr(trainer, "FLAT_DEVICES", ("cpu",))
    made = []

    def graphs_for(model, parameters, **options):
        made.append(PassGraphs(list(parameters), Baked(), find=find))
        return made[-1]

    monkeypatch.setattr(trainer, "graphs_for", graphs_for)
    config = TrainConfig(
        batch_size=2,
        learning_rate=1e-3,
        lora_r=4,
        lora_dropout=0.5,
        lora_targets="gate_proj,up_proj,down_proj",
        checkpoint_every=0,
        report_to=(),
        micro_tokens=30,
    )
    rows = make_rows([20 + i for i in range(10)], task=range(10))
    tables = {"task": make_table(rows, "task")}
    mixture = build(tables, general=None, repeat=1, ordering="shuffle", seed=0)

    def run(name, *, resume=False, stop=False):
        job, done = TrainingJob(tables, mixture, config, 7, tmp_path / name, tmp_path / f"{name}.jsonl"), []
        hooks = TrainingHooks(stopped=lambda: done.append(True) or (stop and len(done) == 3))
        trainer.Trainer(load(tiny_model("llama")), job, hooks=hooks).run(resume=resume)
        return load_file(tmp_path / name / "adapter_model.safetensors")

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("cut", stop=True)
    cut = run("cut", resume=True)
    assert [graphs.replayed for graphs in made] == [9, 5, 3]
    for name, x in whole.items():
        assert (cut[name] - x).norm() <= 1e-3 * x.norm(), name


def test_seeds_of_layers_are_constant_and_differ():
    """With two adapters each, whose masks take the next two numbers; the generator does not move."""
    shapes = {"A": (2, 8), "B": (2, 2)}
    names = [(f"layers.{i}.q.lora_{side}.w", side) for i in range(3) for side in "AB"]
    parameters = {name: torch.nn.Parameter(torch.ones(shapes[side])) for name, side in names}
    scales = {name: 2.0 for name in parameters if "lora_A" in name}
    flat, state = FlatAdapters(parameters, scales, torch.float32), torch.get_rng_state()
    stack, x = Stack(torch.zeros(2, 8), None, (2,), (2.0,), 0.5), torch.ones(3, 8)
    assert flat.grad.storage_offset() == 0

    def seeds():
        layers = [[parameters[f"layers.{i}.q.lora_{side}.w"] for side in "AB"] for i in range(3)]
        plain = [torch.ones(2, 8), torch.ones(2, 2)]
        return [Lora(stack, adapters, x).seed for adapters in (*layers, plain)]

    found = seeds()
    assert found == seeds() and torch.equal(torch.get_rng_state(), state)
    assert sorted(found)[0] >= 0 and min(b - a for a, b in zip(sorted(found), sorted(found)[1:], strict=False)) >= 2


@pytest.mark.parametrize("change", ["", "output", "input", "turned", "shifted"])
def test_a_projection_keeps_its_input_where_it_is_no_longer_the_norms_output(change):
    torch.manual_seed(0)
    width = 6
    x, weight = torch.randn(width, width), torch.rand(width) + 0.5  # square, so that turned it has the same form
    y = RmsNorm.apply(x, weight, 1e-5, 0.0)
    with torch.no_grad():
        if change == "output":
            y.mul_(3)
        elif change == "input":
            x.mul_(torch.rand(width, 1))
    shown = {"turned": y.t(), "shifted": y.reshape(4, 9)}.get(change, y)
    assert (_norm_of(shown) is None) == bool(change)
    k = shown.shape[1]
    a, b = torch.randn(2, k, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    (out,) = Projection.apply(shown, Stack(torch.zeros(5, k), None, (5,), (1.0,), 0.0), a, b)
    expected = torch.autograd.grad((shown @ a.t() @ b.t()).square().sum(), [a, b])
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), [a, b]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))  # terms cancel out
