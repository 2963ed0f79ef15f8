"""Work on a GPU captured as CUDA graphs: thousands of launches repeated by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from weakref import WeakSet

import torch

Work = Callable[[], None]


@lru_cache(maxsize=8)
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all capturers: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


class CudaCapturer:
    """CUDA graphs that share one memory pool: they run one after the other.

    What a graph computes is overwritten by the next one; results must leave the pool before. Work is done and captured
    on a stream of its own, for the default stream cannot be captured. ``torch.cuda.graph`` would wait for the GPU and
    empty the allocator's cache at each capture.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.stream = side_stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()
        self._sharing: WeakSet[torch.cuda.CUDAGraph] = WeakSet()  # the graphs alive in the pool

    def warm(self, work: Work) -> None:
        """Do ``work`` where it will be captured."""
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        try:
            with torch.cuda.stream(self.stream):
                work()
        finally:  # what was launched before an error still writes
            main.wait_stream(self.stream)

    def capture(self, work: Work) -> Work:
        """Record ``work``, which was done before, without doing it; returns what does it."""
        try:
            return self._capture(work)
        except torch.OutOfMemoryError:
            pass  # not here: the error's traceback holds tensors
        torch.cuda.empty_cache()  # which the allocator does by itself, but not while work is captured
        return self._capture(work)

    def _capture(self, work: Work) -> Work:
        main, graph, ended = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph(), False
        if not self._sharing:  # torch refuses a pool whose graphs are all gone
            self.pool = torch.cuda.graph_pool_handle()
        self.stream.wait_stream(main)
        try:
            with torch.cuda.stream(self.stream):
                # Other threads (a server's) may use the GPU meanwhile.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
                    ended = True
        except Exception:
            if not ended:
                self._recover(graph)
            raise
        main.wait_stream(self.stream)
        self._sharing.add(graph)
        return graph.replay

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """A capture that could not begin or end leaves its stream, random numbers and memory pool marked."""
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(generator.clone_state())  # the copy is not marked
        side_stream.cache_clear()
        self.stream = side_stream(self.device)
        _leave_pool(graph, self.device.index, self.pool)
        self._sharing.clear()  # they live on in the pool that is left; the next capture takes a new one


def _leave_pool(graph: torch.cuda.CUDAGraph, index: int, pool: tuple[int, int]) -> None:
    """End the allocations of a failed capture: while one is under way the allocator frees no cached memory.

    From 2.12 on torch does so where a capture cannot end, from 2.14 on in ``reset`` too. What has ended cannot end
    again: torch raises, and a pool that torch gives back itself is not given back twice, under graphs that live in it.
    """
    with suppress(RuntimeError):
        graph.reset()
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    end = end or getattr(torch._C, "_cuda_endAllocateCurrentStreamToPool", None)  # its name before torch 2.8
    release = getattr(torch._C, "_cuda_releasePool", None)
    if end is None or release is None:
        return
    with suppress(RuntimeError, TypeError):
        end(index, pool)
        release(index, pool)  # the beginning of the capture counted it as one of the pool's graphs
