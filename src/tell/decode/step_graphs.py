"""Records a decode step as a CUDA graph, so that its launches cost the host nothing when it is replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch

from tell.errors import first_line

Call = Callable[[], None]


class Recorder(Protocol):
    """How the steps of a batch are run, and recorded after their first run.

    Attributes:
        failed: why no further step can be recorded; empty where that has not failed.
    """

    failed: str

    def run(self, call: Call) -> None:
        """Run a step whose like was not recorded yet."""
        ...

    def record(self, call: Call) -> Call | None:
        """A function that repeats a step, which has run before; None: such steps cannot be recorded."""
        ...


class Unrecorded:
    """Runs every step anew: devices without graphs."""

    failed = ""

    def run(self, call: Call) -> None:
        call()

    def record(self, call: Call) -> Call | None:
        return None


@lru_cache(maxsize=8)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all batches: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


class GraphRecorder:
    """CUDA graphs that share one memory pool.

    Steps run and are recorded on a stream of their own, for a graph cannot be recorded on the default stream.
    ``torch.cuda.graph`` would collect garbage and empty the allocator's cache at each recording.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, _side_stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.failed = ""

    def run(self, call: Call) -> None:
        if self.failed:  # the stream may still be recording
            call()
            return
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            call()
        main.wait_stream(self.stream)

    def record(self, call: Call) -> Call | None:
        if self.failed:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            self.run(lambda: self._capture(graph, call))
        except RuntimeError as error:
            cause = error.__context__ if isinstance(error.__context__, Exception) else error  # the end raises once more
            self.failed = first_line(cause)
            warnings.warn(
                f"a decode step cannot be recorded ({self.failed}); answers are decoded more slowly", stacklevel=2
            )
            return None
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, call: Call) -> None:
        # Other threads (a server's) may allocate meanwhile.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            try:
                call()
            finally:
                graph.capture_end()
        except RuntimeError:
            _free_generator()
            raise


def _free_generator() -> None:
    """The device's random numbers again: a recording that failed leaves them marked as being recorded."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def recorder(device: torch.device) -> Recorder:
    """The recorder of a device."""
    return GraphRecorder(device) if device.type == "cuda" else Unrecorded()
