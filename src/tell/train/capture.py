"""Work on a GPU captured as CUDA graphs: thousands of launches repeated by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

Work = Callable[[], None]


@lru_cache(maxsize=8)
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all capturers: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


class CudaCapturer:
    """CUDA graphs in one memory pool: they run one after the other.

    What a graph computes is overwritten by the next one; results must leave the pool before. Work is done and captured
    on a stream of its own, for the default stream cannot be captured. ``torch.cuda.graph`` would wait for the GPU and
    empty the allocator's cache at each capture.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.stream = side_stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()

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
                self._recover()
            raise
        main.wait_stream(self.stream)
        return graph.replay

    def _recover(self) -> None:
        """A capture that could not begin or end leaves its stream and the device's random numbers marked."""
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(generator.clone_state())  # the copy is not marked
        side_stream.cache_clear()
        self.stream = side_stream(self.device)
