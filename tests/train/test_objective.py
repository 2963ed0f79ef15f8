"""The objective's ingredients in the training loop: distilled general rows, averaged weights, a scaled adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tell.config_sections import TrainConfig
from tell.errors import Interrupted, TellError
from tell.mix.amount import general_rows
from tell.mix.mixture import build
from tell.train import soft_targets
from tell.train.lora import add_lora
from tell.train.plain import PlainBody, plain_step_loss
from tell.train.soft_targets import SoftTargets, cached_targets, untuned_targets
from tell.train.step import Body, StepRules, step_loss
from tell.train.trainer import DISTILLED, Trainer
from tell.train.training_job import TrainingHooks, TrainingJob, run_digest, step_rows
from train.packed import assert_close, gradients, load, make_rows, make_table, wake

CONFIG = TrainConfig(
    **{"batch_size": 4, "learning_rate": 5e-3, "lora_r": 4, "lora_dropout": 0.2, "micro_tokens": 90},
    checkpoint_every=0,
    general_target="text",
)
DISTIL = CONFIG.model_copy(update={"general_target": "untuned"})


def mixture_of(task: int = 3, general: int = 11):
    """(tables, mixture) of short rows, five steps of four."""
    tables = {"general": make_table(make_rows([20 + 3 * i for i in range(general)], seed=2), "general")}
    if task:
        tables["task"] = make_table(make_rows([30 + i for i in range(task)], prefix=12, seed=1), "task")
    draw = general_rows(tables["general"].unit, task_tokens=0, rows=general, seed=0)
    return tables, build(tables, general=draw, repeat=2, ordering="shuffle", seed=0)


def trainer(model, folder: Path, config: TrainConfig, *, mix=None, **hooks) -> Trainer:
    tables, mixture = mix or mixture_of()
    targets = None
    if config.general_target == "untuned":
        targets = untuned_targets(model, tables["general"], range(len(tables["general"])), micro_tokens=90)
    log = folder / "logs" / "tell.jsonl"
    job = TrainingJob(tables, mixture, config, 7, folder / "adapter", log, targets)
    return Trainer(model, job, hooks=TrainingHooks(**hooks))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logs" / "tell.jsonl").read_text().splitlines()]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distribution(model, ids: np.ndarray) -> torch.Tensor:
    """(tokens, V) of transformers' own forward: what follows each token."""
    with torch.no_grad():
        return torch.softmax(model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double(), dim=1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])  # gemma2 caps its logits
def test_targets_are_the_untuned_models_likeliest_tokens(family, tiny_model):
    table = make_table(make_rows([40, 9, 25, 61], prefix=3, seed=4), "general")
    targets = untuned_targets(load(tiny_model(family)), table, [3, 0, 1], micro_tokens=70)
    assert targets.rows.tolist() == [0, 1, 3] and targets.ids.shape[1] == 32 and targets.probs.dtype == np.float16
    plain = load(tiny_model(family))
    held = []
    for i in (0, 1, 3):
        ids, mask = table.row(i)
        expected = distribution(plain, ids)[np.flatnonzero(mask) - 1]
        found = targets.row(i)
        assert len(found.ids) == mask.sum() and all(len(set(row)) == 32 for row in found.ids.tolist())
        own = expected.gather(1, torch.from_numpy(found.ids.astype(np.int64)))
        np.testing.assert_allclose(found.probs[:, :-1], own, rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(found.probs[:, -1], 1 - own.sum(1), rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(own.sum(1), expected.topk(32, dim=1).values.sum(1), rtol=1e-4)
        held.append(own.sum(1))
    assert targets.mass() == pytest.approx(float(torch.cat(held).mean()), abs=1e-3)
    with pytest.raises(KeyError, match="row 2"):
        targets.row(2)


@pytest.mark.parametrize("fast", [True, False])
def test_at_its_start_the_student_is_the_teacher(fast, tiny_model):
    """LoRA begins at zero: the loss is the entropy of the targets, and no general row pulls at the weights."""
    model = load(tiny_model("llama"))
    table = make_table(make_rows([40, 9, 25, 61], seed=4), "general")
    targets = untuned_targets(model, table, range(4))
    rows = [replace(make_rows([40, 9, 25, 61], seed=4)[i], soft=targets.row(i)) for i in range(4)]
    tuned = add_lora(model, CONFIG, seed=1, fused=fast)
    body, step = (Body(tuned), step_loss) if fast else (PlainBody(tuned), plain_step_loss)
    torch.manual_seed(0)
    out = step(body, rows, StepRules(micro_tokens=90))
    probs = torch.from_numpy(targets.probs).double()
    entropy = torch.special.entr(probs / probs.sum(1, keepdim=True)).sum(1)
    means = [float(part.mean()) for part in entropy.split(np.diff(targets.starts).tolist())]
    assert sorted(out.rows) == pytest.approx(sorted(means), rel=1e-4) and out.loss == pytest.approx(np.mean(means))
    pull = torch.cat([g.flatten() for g in gradients(tuned).values()]).norm()
    tuned.zero_grad()
    torch.manual_seed(0)
    step(body, [replace(row, soft=None) for row in rows], StepRules(micro_tokens=90))
    text = torch.cat([g.flatten() for g in gradients(tuned).values()]).norm()
    assert text > 0.01 and pull < 2e-3 * text  # what is left is the rounding of the probabilities to fp16


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("normalization", ["example", "token"])
def test_gradients_equal_plain_transformers(family, normalization, tiny_model):
    """Task rows by their tokens and general rows by distributions in one step, packed and padded, against a row at a
    time through transformers with the definition written out."""
    model = load(tiny_model(family))
    rows = make_rows([40, 33, 9, 25, 61], seed=4, prefix=3, task=(0, 1))
    general = make_table(rows[2:], "general")
    targets = untuned_targets(model, general, range(3))
    rows = [*rows[:2], *(replace(row, soft=targets.row(i)) for i, row in enumerate(rows[2:]))]
    config = CONFIG.model_copy(update={"lora_dropout": 0.0})
    rules = StepRules(normalization, task_weight=2.0, micro_tokens=90, share_prefix=True)
    found = []
    for fast in (True, False):
        tuned = add_lora(load(tiny_model(family)), config, seed=1, fused=fast)
        wake(tuned)
        step, body = (step_loss, Body(tuned)) if fast else (plain_step_loss, PlainBody(tuned))
        found.append((step(body, rows, rules), gradients(tuned)))
    tuned = add_lora(load(tiny_model(family)), config, seed=1, fused=False)
    wake(tuned)
    total, loss = rules.total(rows), torch.zeros(())
    for row in rows:
        ids, trained = torch.from_numpy(row.ids.astype(np.int64)), np.flatnonzero(row.mask)
        log_probs = torch.log_softmax(tuned(input_ids=ids[None]).logits[0][trained - 1].float(), dim=1)
        if row.soft is None:
            each = -log_probs[torch.arange(len(trained)), ids[trained]]
        else:
            top = torch.from_numpy(row.soft.ids.astype(np.int64))
            goal = torch.from_numpy(row.soft.probs.astype(np.float32))
            goal = goal / goal.sum(1, keepdim=True)
            others = torch.ones_like(log_probs).scatter_(1, top, 0.0).bool()
            rest = torch.stack([p[o].logsumexp(0) for p, o in zip(log_probs, others, strict=True)])
            each = -(goal[:, :-1] * log_probs.gather(1, top)).sum(1) - goal[:, -1] * rest
        weight = (2.0 if row.task else 1.0) * (1 if normalization == "token" else 1 / len(trained)) / total
        loss = loss + each.sum() * weight
    loss.backward()
    for out, grads in found:
        assert out.loss == pytest.approx(float(loss.detach()), rel=1e-4)
        assert_close(grads, gradients(tuned), tolerance=1e-3)


def test_the_log_names_the_loss_and_it_falls_to_the_entropy(tiny_model, tmp_path):
    """Trained on general rows alone nothing moves, since the student is its teacher all along."""
    model, (tables, mixture) = load(tiny_model("llama")), mixture_of(task=0)
    config = DISTIL.model_copy(update={"lora_dropout": 0.0, "weight_decay": 0.0, "learning_rate": 1e-6})
    made = trainer(model, tmp_path, config, mix=(tables, mixture))
    made.run()
    probs = torch.from_numpy(made.job.targets.probs).double()
    entropy = torch.special.entr(probs / probs.sum(1, keepdim=True)).sum(1)
    means = np.array([float(part.mean()) for part in entropy.split(np.diff(made.job.targets.starts).tolist())])
    for step, row in enumerate(log(tmp_path)):
        assert set(row["by_source"]) == {DISTILLED}
        assert row["by_source"][DISTILLED] == pytest.approx(means[mixture.row[4 * step :][:4]].mean(), rel=1e-4)
    trainer(model, tmp_path / "both", config).run()
    assert {name for row in log(tmp_path / "both") for name in row["by_source"]} == {DISTILLED, "task"}


def test_distilled_rows_keep_the_model_nearer_to_the_untuned_one(tiny_model, tmp_path):
    """After the same steps on the same rows, the general rows' distributions have moved less than when trained on
    random text."""
    model, mix = load(tiny_model("llama")), mixture_of(task=3, general=24)
    moved = {}
    for config in (CONFIG, DISTIL):
        config = config.model_copy(update={"lora_dropout": 0.0})
        trainer(model, tmp_path / config.general_target, config, mix=mix).run()
        tuned = add_lora(load(tiny_model("llama")), config, seed=7, fused=False)
        weights = adapter(tmp_path / config.general_target)
        with torch.no_grad():
            for name, p in tuned.named_parameters():
                if p.requires_grad:
                    p.copy_(weights[name.replace(".default", "")])
        tuned.eval()
        apart = 0.0
        for i in range(len(mix[0]["general"])):
            ids, _ = mix[0]["general"].row(i)
            before, after = distribution(load(tiny_model("llama")), ids), distribution(tuned, ids)
            apart += float((before * (before / after).log()).sum())
        moved[config.general_target] = apart
    assert moved["untuned"] < 0.75 * moved["text"]


def test_a_job_without_the_targets_it_needs_is_refused(tiny_model, tmp_path):
    tables, mixture = mixture_of()
    job = TrainingJob(tables, mixture, DISTIL, 7, tmp_path / "adapter", tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="no targets"):
        Trainer(load(tiny_model("llama")), job)
    only = build({"task": tables["task"]}, general=None, repeat=2, ordering="shuffle", seed=0)
    assert Trainer(load(tiny_model("llama")), replace(job, mixture=only)).run().steps == 2  # nothing to distil


def test_targets_too_large_for_the_memory_are_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(soft_targets, "free_bytes", lambda device: 10_000)
    table = make_table(make_rows([40, 60]), "general")
    with pytest.raises(TellError, match=r"train.general_target: the distributions at .* free.*general.tokens"):
        untuned_targets(load(tiny_model("llama")), table, [0, 1])


def test_cached_targets_are_those_of_the_first_session(tiny_model, tmp_path):
    """To the bit; other rows, another mask and a damaged file are made anew."""
    path, table = tmp_path / "adapter" / "targets.safetensors", make_table(make_rows([40, 9, 25]), "general")
    model, made = load(tiny_model("llama")), []

    def get(table=table, rows=(0, 2)) -> SoftTargets:
        def make() -> SoftTargets:
            made.append(rows)
            return untuned_targets(model, table, rows)

        return cached_targets(path, table, np.array(rows), make)

    first, second = get(), get()
    assert len(made) == 1
    for part in ("rows", "starts", "ids", "probs"):
        a, b = getattr(first, part), getattr(second, part)
        assert np.array_equal(a, b) and a.dtype == b.dtype
    get(rows=(0, 1))
    assert len(made) == 2
    get(rows=(0, 1))
    assert len(made) == 2
    rows = make_rows([40, 9, 25])
    get(table=make_table([replace(rows[0], mask=np.arange(40) > 3), *rows[1:]], "general"), rows=(0, 1))
    assert len(made) == 3
    path.write_bytes(path.read_bytes()[:50])
    assert len(get().rows) == 2 and len(made) == 4


SETTINGS = {
    "distilled": {"general_target": "untuned"},
    "averaged": {"average": 0.7},
    "everything": {"general_target": "untuned", "average": 1.0, "adapter_scale": 0.5, "fast": "off"},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("after", [1, 3])  # before the averaged steps of "averaged", and among them
def test_resumed_equals_uninterrupted(settings, after, tiny_model, tmp_path):
    config = CONFIG.model_copy(update=SETTINGS[settings])
    model = load(tiny_model("qwen3"))
    trainer(model, tmp_path / "whole", config).run()
    asked = iter([*[False] * (after - 1), True])
    with pytest.raises(Interrupted, match=f"stopped after step {after} of 5"):
        trainer(model, tmp_path / "cut", config, stopped=lambda: next(asked)).run()
    trainer(model, tmp_path / "cut", config).run(resume=True)
    assert equal(adapter(tmp_path / "whole"), adapter(tmp_path / "cut"))
    assert [row["loss"] for row in log(tmp_path / "whole")] == [row["loss"] for row in log(tmp_path / "cut")]


@pytest.mark.parametrize(("share", "steps"), [(0.2, 1), (0.25, 2), (0.7, 4), (1.0, 5), (0.001, 1)])
def test_the_average_is_the_mean_of_the_weights(share, steps, tiny_model, tmp_path):
    """Of the weights after each of the last steps, which a run that stops after each leaves in its checkpoints."""
    model, seen = load(tiny_model("llama")), []
    checkpoint = tmp_path / "each" / "adapter" / "checkpoint" / "state.safetensors"
    for _ in range(4):
        with pytest.raises(Interrupted):
            trainer(model, tmp_path / "each", CONFIG, stopped=lambda: True).run(resume=True)
        state = load_file(checkpoint)
        names = {name: name.removeprefix("weight/").replace(".default", "") for name in state if "weight/" in name}
        seen.append({short: state[name] for name, short in names.items()})
    trainer(model, tmp_path / "each", CONFIG).run(resume=True)
    seen.append(adapter(tmp_path / "each"))
    trainer(model, tmp_path / "mean", CONFIG.model_copy(update={"average": share})).run()
    found = adapter(tmp_path / "mean")
    assert found.keys() == seen[-1].keys()
    for name, value in found.items():
        expected = torch.stack([weights[name].double() for weights in seen[-steps:]]).mean(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-8)
    assert equal(found, seen[-1]) == (steps == 1)


def test_the_scale_is_in_b(tiny_model, tmp_path):
    model = load(tiny_model("llama"))
    trainer(model, tmp_path / "one", CONFIG).run()
    trainer(model, tmp_path / "half", CONFIG.model_copy(update={"adapter_scale": 0.5})).run()
    one, half = adapter(tmp_path / "one"), adapter(tmp_path / "half")
    assert one.keys() == half.keys() and any(value.any() for name, value in one.items() if "lora_B" in name)
    for name, value in one.items():
        assert torch.equal(half[name], 0.5 * value if "lora_B" in name else value)
    configs = [(tmp_path / name / "adapter" / "adapter_config.json").read_text() for name in ("one", "half")]
    assert configs[0] == configs[1]


def test_checkpoints_belong_to_their_objective(tiny_model):
    _, mixture = mixture_of()
    changes = ({}, {"general_target": "untuned"}, {"average": 0.5}, {"adapter_scale": 2.0}, {"loss_on": "all"})
    assert len({run_digest(CONFIG.model_copy(update=change), mixture, 7) for change in changes}) == len(changes)


def test_only_general_rows_have_targets(tiny_model):
    tables, mixture = mixture_of()
    targets = untuned_targets(load(tiny_model("llama")), tables["general"], range(11))
    for step in range(5):
        for row in step_rows(mixture, tables, step, 4, targets):
            assert (row.soft is None) == row.task
            assert row.task or len(row.soft.ids) == row.mask.sum()
