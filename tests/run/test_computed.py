"""How a run was computed: declared names, notes of training under them, fallbacks said."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from run.runs import open_session
from tell.config_sections import ModelConfig
from tell.decode.sampler import Decoding
from tell.progress import Silent
from tell.run import computed
from tell.run.computed import NAMES, answering, describe, named, put
from tell.run.task import Notices
from tell.train.fast import fused
from tell.train.trainer import Trainer
from tell.train.training_job import TrainingHooks
from train.packed import load
from train.test_trainer import CONFIG, trainer


def test_a_note_belongs_to_its_name():
    assert named("CUDA graphs: none (NEFTune draws noise)") == ("CUDA graphs", "none (NEFTune draws noise)")
    assert named("passes of at most 3,072 tokens") == ("passes", "of at most 3,072 tokens")
    assert named("gradients of the adapters are rounded") == ("gradients", "of the adapters are rounded")
    assert named("out of memory: the step is repeated") is None and named("devices are many") is None


def test_notes_of_several_arms():
    found = {}
    assert put(found, "tell", "passes: 3,072 tokens, 30 of 79 GB") and put(found, "sft", "passes: 9 tokens, 1 of 79 GB")
    assert found == {"passes": "3,072 tokens, 30 of 79 GB"}  # numbers alone differ
    assert put(found, "sft", "passes: halved") and found["passes (sft)"] == "halved"
    assert not put(found, "tell", "wandb is turned off") and len(found) == 2


def test_other_notes_are_notices():
    notices = Notices(Silent())
    notices.hear("tell", "attention: flash attention (torch)")
    notices.hear("tell", "tensorboard is turned off")
    assert notices.texts == ["tensorboard is turned off"] and notices.computed == {
        "attention": "flash attention (torch)"
    }
    assert notices.display.notes == ["attention: flash attention (torch)", "tensorboard is turned off"]


def test_what_a_session_uses(monkeypatch):
    model = SimpleNamespace()
    loaded = SimpleNamespace(model=model, device=torch.device("cpu"), why="bf16: the CPU has avx512_bf16")
    engine = SimpleNamespace(name="own", fallback="vLLM does not start (no room)", how="kernels")
    config = SimpleNamespace(model=SimpleNamespace(base="nf4"))
    session = SimpleNamespace(load=lambda: (loaded, engine), config=config, engine=engine)
    notices = Notices(Silent())
    notices.hear("tell", "CUDA graphs: 3 captured")
    notices.recall("tell", answering(session, tuned=False))
    monkeypatch.setattr(fused, "fused_counts", lambda model: {"norm": 61, "attention": 0, "mlp": 30})
    notes = ["attention: padded blocks (the GPU is older than Ampere)", "RMSNorm keeps its own forward (odd)"]
    monkeypatch.setattr(fused, "path_notes", lambda model: notes)
    monkeypatch.setattr(computed, "_device", lambda kind: "Tesla T4")
    found = describe(session, notices)
    assert found == {
        "device": "Tesla T4",
        "number format": "bf16: the CPU has avx512_bf16",
        "base weights": "nf4",
        "attention": "padded blocks (the GPU is older than Ampere)",
        "kernels": "fused: 61 norm, 30 mlp; RMSNorm keeps its own forward (odd)",
        "CUDA graphs": "3 captured",
        "decoding": "TELL's own engine, kernels, vLLM does not start (no room)",
    }
    assert [name for name in NAMES if name in found] == list(found)


def test_how_each_arm_was_answered(tiny_model, monkeypatch):
    """Shown where it is new; nothing is claimed of an arm that decoded nothing."""
    session, notices = open_session(tiny_model("llama")), Notices(Silent())
    engine, decoding = session.engine, Decoding(2, (), greedy=True)
    with session.adapter(None):
        engine.generate([[5, 6]], decoding)
        notices.recall("base", answering(session, tuned=False))
    with session.adapter(None):
        assert answering(session, tuned=True) == []
        engine.fast = False
        engine.generate([[5, 6]], decoding)
        for arm in ("tell", "sft"):
            notices.recall(arm, answering(session, tuned=True))
    slow = "TELL's own engine, transformers' layers"
    assert notices.computed["decoding (tell)"] == notices.computed["decoding (sft)"] == slow
    assert notices.computed["decoding"].startswith("TELL's own engine, ") and notices.computed["decoding"] != slow
    assert notices.computed["adapter"] == "merged into the weights while answering"
    assert notices.display.notes == [
        *(f"decoding: {notices.computed['decoding']}", f"decoding: {slow}"),
        *("adapter: merged into the weights while answering", f"decoding: {slow}"),
    ]


def test_a_run_on_the_plain_path_does_not_claim_kernels(tiny_model, tmp_path, monkeypatch):
    """What training notes comes before what the loaded model, which also decodes, would train with."""
    notices = Notices(Silent())
    job = trainer(load(tiny_model("llama")), tmp_path, CONFIG).job
    off = replace(job, settings=CONFIG.model_copy(update={"fast": "off"}))
    hooks = TrainingHooks(note=lambda text: notices.hear("tell", text))
    Trainer(load(tiny_model("llama")), job, hooks=hooks)
    assert notices.computed == {}
    Trainer(load(tiny_model("llama")), off, hooks=hooks)
    loaded = SimpleNamespace(model=SimpleNamespace(), device=torch.device("cpu"), why="fp32")
    engine = SimpleNamespace(name="own", how="", fallback="")
    session = SimpleNamespace(load=lambda: (loaded, engine), config=SimpleNamespace(model=ModelConfig()))
    monkeypatch.setattr(fused, "fused_counts", lambda model: {"norm": 61})
    monkeypatch.setattr(fused, "path_notes", lambda model: ["attention: flash attention (torch)"])
    found = describe(session, notices)
    assert "decoding" not in found  # nothing was
    assert found["kernels"] == found["attention"] == "transformers' own operations (train.fast=off)"
    assert notices.texts == []
