"""The loop: order, schedule, logs, checkpoints, resume, and the base model given back."""

from __future__ import annotations

import json
import resource
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tell.config_sections import TrainConfig
from tell.errors import Interrupted, TellError
from tell.mix.amount import general_rows
from tell.mix.mixture import build
from tell.train import device
from tell.train import trainer as trainers
from tell.train.checkpoint import save_checkpoint
from tell.train.device import trains_fast
from tell.train.lora import add_lora
from tell.train.neftune import embedding_noise
from tell.train.plain import PlainBody
from tell.train.step import Body, StepRules, step_loss
from tell.train.trainer import Trainer
from tell.train.training_job import TrainingHooks, TrainingJob, learning_rate, step_rows
from train.packed import assert_close, gradients, load, make_rows, make_table, reference_loss, wake

CONFIG = TrainConfig(batch_size=4, learning_rate=5e-3, lora_r=4, lora_dropout=0.2, checkpoint_every=0, micro_tokens=90)


def mixture_of(task: int = 3, general: int = 11, *, seed: int = 0, ids: int = 0):
    """(tables, mixture) of short rows; ``ids`` draws other tokens under the same hashes."""
    tables = {}
    if task:
        tables["task"] = make_table(make_rows([30 + i for i in range(task)], prefix=12, seed=ids + 1), "task")
    if general:
        tables["general"] = make_table(make_rows([20 + 3 * i for i in range(general)], seed=ids + 2), "general")
    draw = general_rows(tables["general"].unit, task_tokens=0, rows=general, seed=seed) if general else None
    return tables, build(tables, general=draw, repeat=2, ordering="shuffle", seed=seed)


def trainer(model, folder: Path, config: TrainConfig = CONFIG, *, mix=None, seed: int = 7, **hooks) -> Trainer:
    tables, mixture = mix or mixture_of()
    job = TrainingJob(tables, mixture, config, seed, folder / "adapter", folder / "logs" / "tell.jsonl")
    return Trainer(model, job, hooks=TrainingHooks(**hooks))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logs" / "tell.jsonl").read_text().splitlines()]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@given(steps=st.integers(1, 60), warmup=st.floats(0, 0.99))
def test_schedule(schedule, steps, warmup):
    config = TrainConfig(learning_rate=2.0, schedule=schedule, warmup_ratio=warmup)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert max(rates) == pytest.approx(2.0) and min(rates) > 0  # every step learns, one at the full rate
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert peak == min(int(np.ceil(warmup * steps)), steps - 1)


def test_schedule_of_known_numbers():
    linear = TrainConfig(learning_rate=1.0, warmup_ratio=0.2)
    assert [learning_rate(linear, s, 1) for s in range(1)] == [1.0]
    assert [learning_rate(linear, s, 5) for s in range(5)] == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25])
    cosine = TrainConfig(learning_rate=1.0, warmup_ratio=0.0, schedule="cosine")
    assert sum(learning_rate(cosine, s, 10) for s in range(10)) == pytest.approx(5.5)


def test_equals_a_loop_over_plain_transformers(tiny_model, tmp_path):
    """The adapter after three steps, against peft, eager attention, AdamW and clipping written out."""
    config = CONFIG.model_copy(update={"lora_dropout": 0.0, "weight_decay": 0.1, "max_grad_norm": 0.5})
    mix = mixture_of(3, 6)
    tables, mixture = mix
    result = trainer(load(tiny_model("mistral")), tmp_path, config, mix=mix).run()
    assert result.steps == 3 and len(mixture) == 12
    model = add_lora(load(tiny_model("mistral")), config, seed=7, fused=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    losses = []
    for step in range(3):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, 3)
        loss = reference_loss(model, step_rows(mixture, tables, step, 4), normalization="example")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert [row["loss"] for row in log(tmp_path)] == pytest.approx(losses, rel=1e-4)
    theirs = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    # Adam divides by tiny second moments: elements without gradient signal differ, the whole does not
    assert_close(adapter(tmp_path), theirs, tolerance=1e-2)


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_tokens_move_within_a_step(fast, tiny_model, tmp_path):
    """Pass by pass: a step may take longer than anybody waits for a sign."""
    moved, steps = [], []
    config = CONFIG.model_copy(update={"fast": fast, "micro_tokens": 60})

    def stepped(report):
        steps.append(report.tokens)
        assert sum(moved) == report.tokens_total

    trainer(load(tiny_model("llama")), tmp_path, config, progress=stepped, moved=moved.append).run()
    assert len(moved) > len(steps) and max(moved) < max(steps)


def test_devices_without_packed_rows_train_by_the_plain_path(tiny_model, tmp_path, monkeypatch):
    assert [trains_fast("auto", name) for name in ("cpu", "cuda", "xpu", "mps")] == [True, True, False, False]
    assert not trains_fast("off", "cpu")
    made = []
    monkeypatch.setattr(device, "FAST_DEVICES", ("cuda",))  # as if the processor were such a device
    monkeypatch.setattr(trainers, "PlainBody", lambda model: made.append(PlainBody(model)) or made[-1])
    trainer(load(tiny_model("llama")), tmp_path).run()
    assert len(made) == 1


def test_logs_and_totals(tiny_model, tmp_path):
    tables, mixture = mix = mixture_of()
    seen = []
    model = load(tiny_model("llama"))
    result = trainer(model, tmp_path, mix=mix, progress=seen.append).run()
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == [report.step for report in seen] == [1, 2, 3, 4, 5]
    assert len(mixture) == 17 and result.steps == 5  # the last batch, of one row, is used
    assert [len(step_rows(mixture, tables, step, 4)) for step in range(5)] == [4, 4, 4, 4, 1]
    assert result.tokens == mixture.column("tokens").sum() == rows[-1]["tokens"] == seen[-1].tokens_total
    assert result.trained_tokens == mixture.column("trained").sum()
    per_step = mixture.examples_per_step(4)
    for row, counts in zip(rows, per_step, strict=True):
        assert set(row["by_source"]) == {name for name, n in zip(mixture.sources, counts, strict=True) if n}
        means = [row["by_source"].get(name, 0.0) for name in mixture.sources]
        assert row["loss"] == pytest.approx(np.dot(means, counts) / counts.sum(), rel=1e-4)
        assert row["grad_norm"] > 0
    assert rows[0]["learning_rate"] == learning_rate(CONFIG, 0, 5)
    assert result.to_dict()["steps"] == 5

    board = EventAccumulator(str(tmp_path / "logs" / "tell"))
    board.Reload()
    for tag, key in (("loss/all", "loss"), ("learning_rate", "learning_rate"), ("grad_norm", "grad_norm")):
        events = board.Scalars(tag)
        assert [e.step for e in events] == [1, 2, 3, 4, 5]
        assert [e.value for e in events] == pytest.approx([row[key] for row in rows], rel=1e-3)
    for source in mixture.sources:
        expected = {row["step"]: row["by_source"][source] for row in rows if source in row["by_source"]}
        got = {e.step: e.value for e in board.Scalars(f"loss/{source}")}
        assert got == pytest.approx(expected, rel=1e-4)


def test_base_model_is_given_back(tiny_model, tmp_path):
    model = load(tiny_model("gemma3"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer(model, tmp_path).run()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    first = adapter(tmp_path)
    trainer(model, tmp_path / "again").run()  # and can be trained again, with the same result
    assert equal(adapter(tmp_path / "again"), first)


def test_seed_decides(tiny_model, tmp_path):
    model = load(tiny_model("llama"))
    trainer(model, tmp_path / "a").run()
    trainer(model, tmp_path / "b", seed=8).run()
    assert not equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_dropout": 0.0}, {"neftune_alpha": 5.0, "loss_normalization": "token", "task_weight": 2.0}],
    ids=["dropout", "shared prefix", "noise"],
)
def test_resumed_equals_uninterrupted(settings, tiny_model, tmp_path):
    """Killed after two steps, and once more after a checkpoint on the way: the same adapter, bit for bit."""
    config = CONFIG.model_copy(update=settings)
    model = load(tiny_model("qwen3"))
    trainer(model, tmp_path / "whole", config).run()

    asked = iter([False, True])
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted, match=r"stopped after step 2 of 5.*--resume") as caught:
        trainer(model, cut, config, stopped=lambda: next(asked)).run()
    assert caught.value.exit_code == 130
    assert (cut / "adapter" / "checkpoint" / "state.safetensors").exists()
    assert not (cut / "adapter" / "adapter_model.safetensors").exists()
    assert [row["step"] for row in log(cut)] == [1, 2]

    class Killed(Exception):
        pass

    def kill(report) -> None:
        if report.step == 4:
            raise Killed

    due = config.model_copy(update={"checkpoint_every": 3})  # how often to save is no matter of the result
    with pytest.raises(Killed):
        trainer(model, cut, due, progress=kill).run(resume=True)
    assert [row["step"] for row in log(cut)] == [1, 2, 3, 4]

    result = trainer(model, cut, config).run(resume=True)
    assert equal(adapter(cut), adapter(tmp_path / "whole"))
    whole, resumed = log(tmp_path / "whole"), log(cut)
    assert [{**row, "seconds": 0} for row in whole] == [{**row, "seconds": 0} for row in resumed]
    assert (result.steps, result.tokens) == (5, whole[-1]["tokens"])


def test_a_plain_path_that_fails_in_one_process_is_agreed_on(tiny_model, tmp_path, monkeypatch):
    """Else the other processes wait for a word of the one that has left."""

    class Alone:
        rank, world, leads, sharded = 0, 2, True, False
        failures: ClassVar[list[str]] = []

        def job(self):
            return nullcontext()

        @contextmanager
        def agreed(self):
            try:
                yield
            except Exception as error:
                self.failures.append(str(error))
                raise

    def fail(model):
        raise MemoryError("no room")

    model = load(tiny_model("llama"))
    tables, mixture = mixture_of()
    config = CONFIG.model_copy(update={"fast": "off"})
    job = TrainingJob(tables, mixture, config, 7, tmp_path / "adapter", tmp_path / "logs" / "tell.jsonl")
    monkeypatch.setattr(trainers, "PlainBody", fail)
    with pytest.raises(MemoryError):
        Trainer(model, job, processes=Alone()).run()
    assert Alone.failures == ["no room"]
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_resume_without_a_checkpoint_starts_anew(tiny_model, tmp_path):
    model = load(tiny_model("llama"))
    trainer(model, tmp_path / "a").run(resume=True)
    trainer(model, tmp_path / "b").run()
    assert equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))


@pytest.fixture
def interrupted(tiny_model, tmp_path):
    """A model and a folder with a checkpoint after step 1."""
    model = load(tiny_model("llama"))
    with pytest.raises(Interrupted):
        trainer(model, tmp_path, stopped=lambda: True).run()
    return model, tmp_path


@pytest.mark.parametrize(
    "options",
    [
        {"config": CONFIG.model_copy(update={"learning_rate": 1e-3})},
        {"config": CONFIG.model_copy(update={"lora_r": 8})},
        {"seed": 8},
        {"mix": mixture_of(seed=1)},
        {"mix": mixture_of(ids=50)},  # the same examples under another anchor or template
    ],
    ids=["rate", "rank", "seed", "order", "tokens"],
)
def test_checkpoint_of_other_settings_is_refused(options, interrupted):
    model, folder = interrupted
    with pytest.raises(TellError, match="belongs to another mixture or other settings"):
        trainer(model, folder, **options).run(resume=True)
    assert [row["step"] for row in log(folder)] == [1]  # what was there stays


def test_damaged_checkpoint_is_named(interrupted):
    model, folder = interrupted
    path = folder / "adapter" / "checkpoint" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TellError, match=r"cannot be read.*--overwrite"):
        trainer(model, folder).run(resume=True)


def test_checkpoint_survives_a_kill_between_its_renames(interrupted, tiny_model, tmp_path):
    model, folder = interrupted
    checkpoint = folder / "adapter" / "checkpoint"
    checkpoint.rename(checkpoint.with_name(".checkpoint.old"))
    steps = []
    trainer(model, folder, progress=lambda report: steps.append(report.step)).run(resume=True)
    assert steps == [2, 3, 4, 5]


def test_full_disk_keeps_the_old_checkpoint(interrupted):
    """A limit on file sizes stands in for the full disk: the write fails in the same place."""
    _, folder = interrupted
    checkpoint = folder / "adapter" / "checkpoint"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    weight = torch.nn.Parameter(torch.zeros(100_000))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        with pytest.raises(TellError, match="cannot write a checkpoint"):
            save_checkpoint(checkpoint, {"w": weight}, torch.optim.AdamW([weight]), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]
    (folder / "file").write_text("")
    with pytest.raises(TellError, match="cannot write a checkpoint"):
        save_checkpoint(folder / "file" / "checkpoint", {"w": weight}, torch.optim.AdamW([weight]), {})


@pytest.mark.parametrize(("task", "general", "steps"), [(1, 0, 1), (3, 0, 2), (0, 5, 2)])
def test_few_rows(task, general, steps, tiny_model, tmp_path):
    """One row (seen twice), fewer rows than a batch, general rows alone: all are trained on."""
    mix = mixture_of(task, general)
    result = trainer(load(tiny_model("llama")), tmp_path, mix=mix).run()
    assert result.steps == steps and result.tokens == mix[1].column("tokens").sum()
    assert any(value.any() for name, value in adapter(tmp_path).items() if "lora_B" in name)


def test_training_lowers_the_loss_in_bfloat16_as_in_fp32(tiny_model, tmp_path):
    tables, mixture = mixture_of(4, 0)
    config = CONFIG.model_copy(update={"batch_size": 1, "lora_dropout": 0.0, "learning_rate": 1e-2})
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        trainer(load(tiny_model("llama"), dtype=dtype), folder, config, mix=(tables, mixture)).run()
        losses[dtype] = [row["loss"] for row in log(folder)]
        assert all(value.dtype == torch.float32 for value in adapter(folder).values())
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.05)
    assert np.mean(losses[torch.float32][4:]) < np.mean(losses[torch.float32][:4])


def test_noise_is_in_training_only_and_sized_by_the_row(tiny_model):
    """NEFTune's L is the row's own length, not that of the pack; evaluation sees no noise."""
    model = add_lora(load(tiny_model("llama")), TrainConfig(lora_dropout=0.0), seed=1)
    wake(model)
    body = Body(model)
    rows = make_rows((64, 16, 4))

    def losses() -> np.ndarray:
        torch.manual_seed(0)
        return step_loss(body, rows, StepRules("example"), backward=False).rows

    clean = losses()
    noise, embedded = embedding_noise(model, 3.0), []
    noise.__enter__()
    spy = model.get_input_embeddings().register_forward_hook(lambda m, i, o: embedded.append(o))
    noisy = losses()
    with torch.no_grad():
        exact = model.get_input_embeddings().weight[torch.from_numpy(np.concatenate([r.ids for r in rows])).long()]
    added = (embedded[0][0] - exact).abs().split([64, 16, 4])
    for part, length in zip(added, (64, 16, 4), strict=True):
        limit = 3.0 / (length * 64) ** 0.5
        assert 0.9 * limit < part.max() <= 1.0001 * limit
    assert np.abs(noisy - clean).min() > 1e-5
    model.eval()
    assert np.array_equal(losses(), clean)
    model.train()
    assert not np.array_equal(losses(), clean)
    spy.remove()
    noise.__exit__(None, None, None)
    assert np.array_equal(losses(), clean)
    with embedding_noise(model, 0.0):
        assert np.array_equal(losses(), clean)


def test_order_inside_a_step_is_the_mixtures(tiny_model):
    tables, mixture = mixture_of()
    flat = [row for step in range(5) for row in step_rows(mixture, tables, step, 4)]
    for at, row in enumerate(flat):
        name = mixture.sources[mixture.source[at]]
        ids, mask = tables[name].row(int(mixture.row[at]))
        assert np.array_equal(row.ids, ids) and np.array_equal(row.mask, mask)
        assert row.task == (name == "task") and mixture.sources[row.source] == name


def test_gradients_do_not_pile_up(tiny_model, tmp_path):
    """A step's gradient norm is its own: the log's second norm equals that of a fresh pass at the same weights."""
    config = CONFIG.model_copy(update={"lora_dropout": 0.0, "learning_rate": 1e-9, "max_grad_norm": 0.0})
    tables, mixture = mix = mixture_of()
    trainer(load(tiny_model("llama")), tmp_path, config, mix=mix).run()
    model = add_lora(load(tiny_model("llama")), config, seed=7)
    body = Body(model)
    for step, row in enumerate(log(tmp_path)):
        model.zero_grad()
        step_loss(body, step_rows(mixture, tables, step, 4), StepRules("example"))
        norm = torch.stack([g.norm() for g in gradients(model).values()]).norm()
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


@pytest.mark.parametrize("resumed", [False, True])
def test_logs_hold_each_step_once(resumed, tiny_model, tmp_path):
    """Whether a run goes on or starts over, neither log shows a step of the older attempt again."""
    model = load(tiny_model("llama"))
    config = CONFIG.model_copy(update={"checkpoint_every": 2})

    def fail(report) -> None:
        if report.step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer(model, tmp_path, config, progress=fail).run()
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3]
    time.sleep(1.1)  # TensorBoard orders the files of a folder by the second they were begun in
    trainer(model, tmp_path, config).run(resume=resumed)
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4, 5]
    board = EventAccumulator(str(tmp_path / "logs" / "tell"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/all")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("normalization", ["example", "token"])
def test_training_curves_of_the_fast_and_the_plain_path_lie_on_each_other(family, normalization, tiny_model, tmp_path):
    mix = mixture_of(task=5, general=24)
    curves, adapters = [], []
    for fast in ("auto", "off"):
        config = CONFIG.model_copy(update={"fast": fast, "lora_dropout": 0.0, "loss_normalization": normalization})
        folder = tmp_path / fast
        trainer(load(tiny_model(family)), folder, config, mix=mix).run()
        curves.append([(row["loss"], row["grad_norm"]) for row in log(folder)])
        adapters.append(adapter(folder))
    assert len(curves[0]) > 5
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-3)
    fast, plain = (torch.cat([w.flatten() for _, w in sorted(weights.items())]) for weights in adapters)
    assert (fast - plain).norm() < 1e-2 * plain.norm()  # Adam divides by gradients near zero
