"""What is called of CUDA to capture work, in order; without a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from tell.train import capture as module
from tell.train.capture import CudaCapturer

OUT_OF_MEMORY = torch.OutOfMemoryError
RELEASE, ENDS = "_cuda_releasePool", ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")


class Graph:
    """``torch.cuda.CUDAGraph``, which can be referred to weakly."""

    def __init__(self, cuda):
        self.cuda, self.capture_begin, self.capture_end = cuda, cuda.begin, cuda.end

    def reset(self):
        self.cuda.calls.append("reset")

    def replay(self):
        self.cuda.calls.append("replayed")


class Cuda:
    """``torch.cuda`` as far as ``CudaCapturer`` uses it, and what is called in order."""

    def __init__(self):
        self.calls, self.streams, self.broken, self.pools = [], 0, "", []
        self.default_generators = [
            SimpleNamespace(clone_state=lambda: "copy", graphsafe_set_state=lambda state: self.calls.append(state))
        ]
        handles = count(1)
        self.graph_pool_handle = lambda: (0, next(handles))
        self.current_device = lambda: 0
        self.empty_cache = lambda: self.calls.append("emptied")
        self.main = self.now = self._stream("main")
        self.current_stream = lambda device: self.now
        self.CUDAGraph = partial(Graph, self)

    def Stream(self, device):
        self.streams += 1
        return self._stream(f"side {self.streams}")

    def _stream(self, name):
        return SimpleNamespace(name=name, wait_stream=lambda other: self.calls.append(f"{name} waits for {other.name}"))

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def begin(self, *, pool, capture_error_mode):
        assert capture_error_mode == "thread_local" and self.now is not self.main
        self.calls.append("begin")
        self.pools.append(pool)
        if self.broken == "begin":
            raise RuntimeError("cannot begin")

    def end(self):
        self.calls.append("end")
        if self.broken == "end":
            raise RuntimeError("capture failed")


@pytest.fixture
def cuda(monkeypatch):
    module.side_stream.cache_clear()
    fake = Cuda()
    monkeypatch.setattr(module.torch, "cuda", fake)
    for name in (*ENDS, RELEASE):
        monkeypatch.delattr(torch._C, name, raising=False)
    yield fake
    module.side_stream.cache_clear()


def test_work_is_done_and_captured_on_one_side_stream(cuda):
    """One for all capturers of a device, whatever it is called."""
    first, second = CudaCapturer(torch.device("cuda")), CudaCapturer(torch.device("cuda", 0))
    where = []
    first.warm(lambda: where.append(cuda.now.name))
    around = ["side 1 waits for main", "main waits for side 1"]
    assert cuda.calls == around
    replay = second.capture(lambda: where.append(cuda.now.name))
    assert where == ["side 1", "side 1"] and cuda.now is cuda.main and cuda.streams == 1
    assert cuda.calls[2:] == [around[0], "begin", "end", around[1]]
    replay()
    assert cuda.calls[-1] == "replayed"


def test_who_goes_on_after_an_error_waits_for_what_was_launched(cuda):
    def work():
        raise OUT_OF_MEMORY("out of memory")

    with pytest.raises(OUT_OF_MEMORY):
        CudaCapturer(torch.device("cuda")).warm(work)
    assert cuda.calls == ["side 1 waits for main", "main waits for side 1"] and cuda.now is cuda.main


@pytest.mark.parametrize("broken", ["", "begin", "end"])
def test_a_failed_capture_leaves_streams_and_generator_usable(broken, cuda):
    """Where it did not begin or end, the stream may still be captured, and is replaced; nobody waits for it."""

    def work():
        raise RuntimeError("not permitted")

    cuda.broken = broken
    capturer = CudaCapturer(torch.device("cuda"))
    with pytest.raises(RuntimeError, match={"begin": "cannot begin", "end": "capture failed"}.get(broken, "not perm")):
        capturer.capture(work)
    assert cuda.now is cuda.main and "main waits for side 1" not in cuda.calls
    assert ("copy" in cuda.calls) == ("reset" in cuda.calls) == bool(broken)
    names = [one.stream.name for one in (capturer, CudaCapturer(torch.device("cuda")))]
    assert names == ["side 2" if broken else "side 1"] * 2


def test_graphs_share_a_pool_while_one_of_them_lives(cuda):
    """torch refuses a pool whose graphs are all gone."""
    capturer = CudaCapturer(torch.device("cuda"))
    kept = [capturer.capture(lambda: None) for _ in range(2)]
    kept.pop(0)
    kept.append(capturer.capture(lambda: None))
    assert len(set(cuda.pools)) == 1
    kept.clear()
    kept.append(capturer.capture(lambda: None))
    assert len(set(cuda.pools)) == 2


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("broken", ["begin", "end"])
def test_a_failed_capture_gives_its_pool_back_and_the_next_takes_another(broken, name, cuda, monkeypatch):
    """By the names of old and new torch; what was captured before lives on in the pool that is left."""
    monkeypatch.setattr(torch._C, name, lambda index, pool: cuda.calls.append(("end", index, pool)), raising=False)
    monkeypatch.setattr(torch._C, RELEASE, lambda *of: cuda.calls.append(("release", *of)), raising=False)
    capturer = CudaCapturer(torch.device("cuda"))
    before = capturer.capture(lambda: None)
    cuda.broken, cuda.calls[:] = broken, []
    with pytest.raises(RuntimeError):
        capturer.capture(lambda: None)
    (pool,) = set(cuda.pools)
    done = [call for call in cuda.calls if call == "reset" or isinstance(call, tuple)]
    assert done == ["reset", ("end", 0, pool), ("release", 0, pool)]
    cuda.broken = ""
    after = [capturer.capture(lambda: None) for _ in range(2)]
    assert cuda.pools[:2] == [pool] * 2 and cuda.pools[2] == cuda.pools[3] != pool
    for replay in (before, *after):
        replay()
    assert cuda.calls.count("replayed") == 3


@pytest.mark.parametrize("error", [RuntimeError("not currently recording"), TypeError("incompatible arguments"), None])
def test_a_pool_that_torch_has_ended_itself_is_not_given_back_twice(error, cuda, monkeypatch):
    """A count too low would free it under living graphs; nor is another error hidden, or a name missed."""

    def end(index, pool):
        raise error

    if error is not None:
        monkeypatch.setattr(torch._C, ENDS[0], end, raising=False)
    monkeypatch.setattr(torch._C, RELEASE, lambda *of: cuda.calls.append("released"), raising=False)
    cuda.broken = "end"
    with pytest.raises(RuntimeError, match="capture failed"):
        CudaCapturer(torch.device("cuda")).capture(lambda: None)
    assert "released" not in cuda.calls


@pytest.mark.parametrize("enough", [True, False])
def test_a_capture_that_runs_out_of_memory_gets_what_is_cached(enough, cuda):
    tries = []

    def work():
        tries.append(len(tries))
        if not enough or len(tries) == 1:
            raise OUT_OF_MEMORY("out of memory")

    capturer = CudaCapturer(torch.device("cuda"))
    if enough:
        capturer.capture(work)()
        assert cuda.calls[-1] == "replayed"
    else:
        with pytest.raises(OUT_OF_MEMORY):
            capturer.capture(work)
    assert tries == [0, 1] and cuda.calls.count("emptied") == 1 and "copy" not in cuda.calls
