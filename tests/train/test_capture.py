"""What is called of CUDA to capture work, and which models train through graphs; without a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tell.train import graphs as module
from tell.train.graphs import CudaCapturer, graphs_for
from train.packed import load


class Streams:
    """``torch.cuda`` as far as ``CudaCapturer`` uses it, and what is called in order."""

    def __init__(self):
        self.calls, self.now, self.marked = [], "main", False
        self.default_generators = [
            SimpleNamespace(clone_state=lambda: "copy", graphsafe_set_state=lambda state: self.calls.append(state))
        ]
        self.graph_pool_handle = lambda: "pool"
        self.current_device = lambda: 0
        outer = self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_stream(self, other):
                outer.calls.append(f"{self.name} waits for {other.name}")

        self.main, side = Stream("main"), Stream("side")
        self.now = self.main
        self.Stream = lambda device: side
        self.current_stream = lambda device: self.now
        self.set_stream = lambda stream: setattr(self, "now", stream)
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: outer.calls.append("replayed"))

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    @contextmanager
    def graph(self, graph, pool, stream, *, capture_error_mode):
        assert (pool, stream.name, capture_error_mode) == ("pool", "side", "thread_local")
        self.now = stream
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("capture failed") from error  # and the stream stays
        self.now = self.main


@pytest.fixture
def streams(monkeypatch):
    fake = Streams()
    monkeypatch.setattr(module.torch, "cuda", fake)
    return fake


def test_work_is_warmed_up_where_it_is_captured(streams):
    capturer = CudaCapturer(torch.device("cuda"))
    where = []

    def work():
        where.append(streams.now.name)

    capturer.warm(work)
    assert streams.calls == ["side waits for main", "main waits for side"]
    replay = capturer.capture(work)
    assert where == ["side", "side"] and streams.now is streams.main
    replay()
    assert streams.calls[-1] == "replayed"


def test_a_failed_capture_leaves_stream_and_generator_usable(streams):
    def work():
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="capture failed"):
        CudaCapturer(torch.device("cuda")).capture(work)
    assert streams.now is streams.main and streams.calls == ["copy"]


def test_what_trains_through_graphs(tiny_model, streams, monkeypatch):
    """Small models with flash attention; why a small one does not is said."""
    causal = load(tiny_model("llama"))

    def made(device="cuda", size=1e8, noise=False, refusal=None):
        notes = []
        monkeypatch.setattr(module, "flash_refusal", lambda model: refusal)
        weight = SimpleNamespace(device=torch.device(device))
        model = SimpleNamespace(
            config=causal.config,
            num_parameters=lambda: size,
            get_output_embeddings=lambda: SimpleNamespace(weight=weight),
        )
        return graphs_for(model, [], noise=noise, note=notes.append), notes

    graphs, notes = made()
    assert isinstance(graphs.capturer, CudaCapturer) and notes == []
    assert made(device="cpu") == made(size=8e9) == (None, [])
    assert made(noise=True) == (None, ["CUDA graphs: none (NEFTune draws noise by each row's length)"])
    assert made(refusal="the weights are float32") == (None, ["CUDA graphs: none (the weights are float32)"])
