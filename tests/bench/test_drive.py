"""Workers that fail say why."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from bench.drive import ROOT, Worker, python_path
from bench.engines.gate import Gate

from tell.errors import TellError
from train.packed import Fetches


def test_an_engine_that_raises_is_reported_with_its_log(tmp_path):
    spec = {"model": str(tmp_path / "nothing"), "dtype": "float32", "device": "cpu", "ceiling_seconds": 0.1}
    worker = Worker("ceiling", "ceiling", spec, tmp_path)
    with pytest.raises(TellError, match="ceiling") as caught:
        worker.ask(do="turn")
    worker.close()
    assert str(worker.log) in str(caught.value) and "Traceback" in worker.log.read_text()


def test_an_engine_that_is_killed_is_reported(tmp_path):
    worker = Worker("ceiling", "ceiling", {"model": "x", "dtype": "float32", "device": "cpu"}, tmp_path)
    worker.process.kill()
    with pytest.raises(TellError, match="killed"):
        worker.ask(do="turn")
    worker.close()


def test_carried_packages_reach_our_own_workers_alone(monkeypatch):
    """Peers in environments of their own would take what the caller's path holds for theirs."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/carried/wheels", "", "/more"]))
    assert python_path(own=True).split(os.pathsep) == [str(ROOT), str(ROOT / "src"), "/carried/wheels", "/more"]
    assert python_path(own=False) == str(ROOT)


def test_counting_a_peers_tokens_waits_for_no_gpu():
    gate = Gate(SimpleNamespace(tokens=0))
    with Fetches() as fetches:
        for _ in range(2):
            gate._count(None, (), {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})
    assert fetches.names == [] and int(gate.meter.tokens) == 6
