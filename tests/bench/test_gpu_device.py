"""A device that is lost, a capture that fails and the clock, by fakes of CUDA."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from bench.gpu import __main__ as entry
from bench.gpu import checks, peers, run, runners
from bench.gpu.run import Run, make_model

ILLEGAL = "CUDA error: an illegal memory access was encountered"


class Replaced(Exception):
    """Instead of another program in the place of this one."""


@pytest.fixture
def cuda(monkeypatch):
    """The calls of CUDA that a Run makes; ``broken`` raises in all of them from then on."""
    fake = SimpleNamespace(broken=False)

    def call(*args):
        if fake.broken:
            raise RuntimeError(ILLEGAL)
        return 0

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, call)
    monkeypatch.setattr(run.gc, "collect", lambda: None)  # it takes long where much is imported
    fake.call = call
    return fake


@pytest.fixture
def replaced(monkeypatch):
    """Command lines of the processes that took this one's place."""
    seen = []

    def execv(program, arguments):
        assert program == sys.executable
        seen.append(arguments)
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(entry, "keep_no_files", lambda: None)
    return seen


def stages(monkeypatch, **functions):
    monkeypatch.setattr(entry, "STAGES", functions)
    monkeypatch.setattr(entry, "PATCHING", {"patching": "patcher"})


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_lost_device_costs_one_stage(tmp_path, monkeypatch, cuda, replaced):
    """What was measured is saved, the stage is named with its error, and a fresh process does the rest."""

    def bad(run):
        run.stages["bad"]["part"] = 1
        cuda.broken = True
        cuda.call()

    stages(monkeypatch, first=lambda run: {"a": 1}, bad=bad, last=lambda run: {"b": 2})
    arguments = ["--out", str(tmp_path), "--stages", "first,bad,last", "--deadline", "100", "--micro", "512"]
    with pytest.raises(Replaced):
        entry.main(arguments, begin=run.now() - 40)
    saved = result(tmp_path)["stages"]
    assert saved["first"] == {"a": 1} and saved["bad"]["part"] == 1
    assert saved["bad"]["error"] == f"RuntimeError: {ILLEGAL}" == saved["bad"]["device lost"]

    (command,) = replaced
    assert command[1:3] == ["-m", "bench.gpu"] and command[command.index("--stages") + 1] == "last"
    assert command[command.index("--micro") + 1] == "512" and float(command[command.index("--deadline") + 1]) <= 60
    cuda.broken = False
    assert entry.main(command[3:]) == 1  # for what was found before
    merged = result(tmp_path)
    assert list(merged["stages"]) == ["first", "bad", "last"] == list(merged["seconds"])
    assert merged["stages"]["last"] == {"b": 2} and any(ILLEGAL in str(value) for _, value, _ in merged["findings"])


def test_a_part_that_loses_the_device_does_not_cost_the_others(tmp_path, monkeypatch, cuda, replaced):
    """The stage is taken up again, without the part that broke the device."""
    tried = []

    def part(run, model, rows, plan):
        tried.append(len(tried))
        if len(tried) == 1:
            cuda.broken = True
            cuda.call()
        return SimpleNamespace(facts=lambda *a: {"tokens_s": 7})

    monkeypatch.setattr(peers, "make_model", lambda *a: None)
    ways = {name: part for name in "abc"}
    stages(monkeypatch, peers=lambda run: peers.compare(run, "peers", ways), last=lambda run: {"b": 2})
    arguments = ["--out", str(tmp_path), "--stages", "peers,last", "--tiny"]
    with pytest.raises(Replaced):
        entry.main(arguments)
    assert len(tried) == 1  # nothing else is tried on it
    (command,) = replaced
    assert command[command.index("--stages") + 1] == "peers,last" and "--tiny" in command
    cuda.broken = False
    entry.main(command[3:])
    merged = result(tmp_path)["stages"]
    assert merged["peers"]["tiny: a"] == {"error": f"RuntimeError: {ILLEGAL}"} and len(tried) == 3
    assert merged["peers"]["tiny: b"]["tokens_s"] == merged["peers"]["tiny: c"]["tokens_s"] == 7 and "last" in merged


def test_an_error_of_a_part_is_saved_before_memory_is_given_back(tmp_path, monkeypatch, cuda):
    one = Run(tmp_path, "cuda", True, ["tiny"], 8, 512, 60)
    saved = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: saved.append(result(tmp_path)))
    out = one.stages.setdefault("train", {})
    one.failed(out, "one", RuntimeError("no kernel"))
    assert saved[0]["stages"]["train"]["one"] == {"error": "RuntimeError: no kernel"}
    assert one.lost is None and not one.late("next", 1)
    cuda.broken = True
    one.clear()
    assert ILLEGAL in one.lost and one.late("next", 1)


def test_what_patches_transformers_ends_its_process(tmp_path, monkeypatch, replaced):
    """Once its package is imported, also where it measured nothing."""
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--stages", "patching,last"]
    stages(monkeypatch, patching=lambda run: {}, last=lambda run: {})  # the peer is not installed
    entry.main(arguments)
    assert not replaced

    def patching(run):
        monkeypatch.setitem(sys.modules, "patcher", sys)
        return {}

    stages(monkeypatch, patching=patching, last=lambda run: {})
    with pytest.raises(Replaced):
        entry.main(arguments)


def test_files_are_not_handed_on(tmp_path):
    with (tmp_path / "driver").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        entry.keep_no_files()
        assert not os.get_inheritable(file.fileno())


@pytest.mark.parametrize("recovers", [True, False])
def test_a_capture_that_fails_and_what_comes_after(tmp_path, monkeypatch, cuda, recovers):
    """As `capture` leaves the device: it goes on, or the allocator refuses from then on."""

    class Capturer:
        def __init__(self, device):
            self.device = torch.device("cpu")

        def warm(self, work):
            work()

        def capture(self, work):
            if work.__closure__ and len(work.__closure__) == 1:  # the one with .item()
                cuda.broken = not recovers
                raise RuntimeError("operation not permitted when stream is capturing")
            return work

    monkeypatch.setattr("tell.train.capture.CudaCapturer", Capturer)
    monkeypatch.setattr(checks, "make_model", lambda size, device, dtype: make_model(size, "cpu", dtype))
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device=None: ones(*size))
    monkeypatch.setattr(runners, "counted_waits", lambda *a: nullcontext())
    one = Run(tmp_path, "cuda", True, ["tiny"], 8, 512, 60)
    found = checks.capture(one)
    assert "capturing" in found["failed with"] and found["recovered"] is recovers
    assert found["memory given back"] is True or ILLEGAL in found["memory given back"]["error"]
    assert ("another capture" in found) is recovers and (one.lost is None) is recovers
    assert one.findings[-1][2] is recovers
    cuda.broken, one.lost, told = False, None, len(one.findings)
    assert checks.capture(one) is found and len(one.findings) == told  # a fresh process does not break itself too
