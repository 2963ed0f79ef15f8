"""The order and the length of what runs on a GPU, by a clock that only the fakes move."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench.gpu import __main__ as entry
from bench.gpu import adapters, peers, run, runners, speed, training
from bench.gpu.goals import BIG, SMALL
from safetensors.torch import save_file

from tell.errors import Interrupted

LOADING = {BIG: 6.0, SMALL: 2.0}  # seconds
COMPILING = 20.0  # kernels, in the first step of a size by TELL
TELL = {BIG: 0.197, SMALL: 0.217}  # seconds a step, as measured on an H100 before steps were fused
PADDED = {  # seconds a step of peft by rows a pass, measured on the same
    (SMALL, 16): 0.357, (SMALL, 4): 1.497, (SMALL, "checkpointing"): 1.827,
    (BIG, 4): 1.585, (BIG, "checkpointing"): 2.0,
}  # fmt: skip
FIRST = {SMALL: 1.3, BIG: 5.8}  # seconds more of a peer's first step
STAGES = {"facts": 1.0, "attention": 12.0, "equal": 45.0, "resume": 35.0, "capture": 5.0}
RIGHT = {
    "attention": {"worst": 1e-3},
    "equal": {name: {"loss_gap": 1e-5} for name in ("float32", "bfloat16", "float16")},
    "resume": {"float32": {"equal": True}, "bfloat16": {"cosine": 1.0}},
}


class Clock:
    """A machine whose work takes ``factor`` times as long as the one measured."""

    def __init__(self, factor: float) -> None:
        self.at, self.factor, self.size, self.compiled = 0.0, factor, "", set()

    def spend(self, seconds: float) -> None:
        self.at += seconds * self.factor

    def make_model(self, size, device="cuda", *rest):
        self.size = size
        self.spend(LOADING[size] if device == "cuda" else 0)
        return self.model

    def compile(self):
        self.spend(0 if self.size in self.compiled else COMPILING)
        self.compiled.add(self.size)

    def train(self, model, job, *, device, hooks):
        """TELL's Trainer."""

        def work():
            rows, batch = len(job.mixture), job.settings.batch_size
            job.log.write_text('{"grad_norm": 1.0}\n')
            self.compile()
            for _ in range(rows // batch):
                self.spend(TELL[self.size])
                hooks.progress(SimpleNamespace(loss=1.0))
                if hooks.stopped():
                    raise Interrupted("stopped", where="here", remedy="none")
            save_file({"a": torch.ones(1)}, str(job.folder / "adapter_model.safetensors"))

        return SimpleNamespace(run=work)

    def padded(self, run, tuned, rows, plan, *, micro_rows, checkpointing=False):
        first = [FIRST[self.size]]

        def step(numbers):
            if (self.size, micro_rows) == (BIG, 16):
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.spend(PADDED[self.size, "checkpointing" if checkpointing else micro_rows] + sum(first))
            first.clear()
            return 1.0

        return runners.stepped(run, rows, plan, step)

    def decode(self, run, size, out):
        self.make_model(size)
        self.spend(15)
        out[f"{size} tell"] = {"tokens_s": 5000}

    def apply(self, run, engine, folder, before, name, out):
        self.spend(4)
        out[name.rpartition(", ")[2]] = {"apply_s": 0.5, "more_gb": 0.1}

    def profile(self, run, size):
        self.make_model(size)
        self.compile()
        self.spend((9 if size == BIG else 22) * 3 * TELL[size])  # it was three times as slow while profiled
        return {"busy": 0.95}


@pytest.fixture
def clock(monkeypatch, request):
    clock = Clock(request.param)
    tiny = run.SIZES["tiny"]
    clock.model = run.make_model("tiny", "cpu", torch.bfloat16)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: clock.at))
    for size in (BIG, SMALL):
        monkeypatch.setitem(run.SIZES, size, tiny)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(run.gc, "collect", lambda: None)  # it takes long where much is imported
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 30e9)
    for name, seconds in STAGES.items():
        monkeypatch.setitem(entry.STAGES, name, lambda run, n=name, s=seconds: clock.spend(s) or RIGHT.get(n, {}))
    for module in (adapters, peers, training):
        monkeypatch.setattr(module, "make_model", clock.make_model)
    monkeypatch.setattr("tell.train.trainer.Trainer", clock.train)
    monkeypatch.setattr(runners, "counted_waits", lambda *a: nullcontext())
    monkeypatch.setattr(runners, "lora", lambda model: model)
    monkeypatch.setattr(runners, "padded", clock.padded)
    monkeypatch.setattr(speed, "_decode", clock.decode)
    monkeypatch.setattr(speed, "_profile", clock.profile)
    monkeypatch.setattr(adapters, "_apply", clock.apply)
    monkeypatch.setattr(training, "held_back", lambda *a: nullcontext(0.0))
    monkeypatch.setattr(training, "quantised", lambda model, base: model)
    monkeypatch.setattr(training, "_predicted", lambda *a: 30.0)
    monkeypatch.setattr(training, "find_spec", lambda name: name)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    return clock


def measured(tmp_path, clock):
    entry.main(["--out", str(tmp_path)], begin=-12.0)  # importing took so long
    return json.loads((tmp_path / "result.json").read_text())


@pytest.mark.parametrize("clock", [1.0], indirect=True)
def test_every_figure_is_reached_within_the_default_time(tmp_path, clock):
    result = measured(tmp_path, clock)
    assert clock.at + 12 <= 480
    assert [goal["name"] for goal in result["goals"] if goal["value"] is None] == []
    peers = result["stages"]["peers"]
    assert len(peers) == 6 and [key for key, value in peers.items() if "error" in value] == [f"{BIG}: peft, padded x16"]
    assert peers[f"{SMALL}: peft, padded x16"]["ms_step"] == 357.0
    late = {name for name, value, _ in result["findings"] if value == "no time left"}
    assert late <= {f"{size}: {name}" for size in (BIG, SMALL) for name in training.PARTS} | {"parts"}


@pytest.mark.parametrize("clock", [2.0, 4.0, 15.0], indirect=True)
def test_a_slower_machine_measures_less_and_ends_in_time(tmp_path, clock):
    result = measured(tmp_path, clock)
    longest = clock.factor * (max(LOADING.values()) + max(COMPILING, STAGES["equal"]))  # a first step, or a stage
    assert clock.at + 12 <= 480 + longest
    assert any(value == "no time left" for _, value, _ in result["findings"])


@pytest.mark.parametrize("clock", [1.0], indirect=True)
def test_a_peer_stops_before_the_deadline_and_says_after_how_many_steps(tmp_path, clock):
    plan = training.plan_for(run.Run(tmp_path, "cuda", False, [SMALL], 16, 512, 60), SMALL, graphs=False)
    rows = run.rows_for("tiny", plan.rows, 0.2)
    for deadline, steps in ((60, 11), (12, 7), (4, 1)):
        clock.at, clock.size = 0.0, SMALL
        one = run.Run(tmp_path, "cuda", False, [SMALL], 16, 512, deadline)
        timed = clock.padded(one, None, rows, plan, micro_rows=4)
        assert clock.at <= deadline and len(timed.ends) == steps and timed.whole is (steps == 11)
    with pytest.raises(ValueError, match=r"no time left after 1 steps of 2\.8 s"):
        timed.facts(rows, plan)


def test_a_training_of_ours_stops_too(tmp_path, monkeypatch):
    """By the Trainer's own way, which reports the step before."""
    ticks = iter(range(1000))
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    one = run.Run(tmp_path, "cpu", True, ["tiny"], 8, 512, 40.0, begin=0.0)
    model, plan = run.make_model("tiny", "cpu", torch.bfloat16), runners.Plan(2, 2, 60)
    timed = runners.tell(one, model, run.rows_for("tiny", plan.rows, 0.2), plan, {})
    assert not timed.whole and timed.adapter is None and 3 < len(timed.ends) < 40
    assert len(timed.norms) == len(timed.ends) and np.isfinite(timed.losses).all()
