"""Records a decode step as a CUDA graph, so that its launches cost the host nothing when it is replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch

from tell.errors import first_line
from tell.train.capture import CudaCapturer

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


class GraphRecorder:
    """Steps as CUDA graphs, until one cannot be captured."""

    def __init__(self, device: torch.device) -> None:
        self.capturer = CudaCapturer(device)
        self.failed = ""

    def run(self, call: Call) -> None:
        if self.failed:  # nothing will be recorded
            call()
        else:
            self.capturer.warm(call)

    def record(self, call: Call) -> Call | None:
        if self.failed:
            return None
        try:
            return self.capturer.capture(call)
        except RuntimeError as error:
            cause = error.__context__ if isinstance(error.__context__, Exception) else error  # the end raises once more
            self.failed = first_line(cause)
            warnings.warn(
                f"a decode step cannot be recorded ({self.failed}); answers are decoded more slowly", stacklevel=2
            )
            return None


def recorder(device: torch.device) -> Recorder:
    """The recorder of a device."""
    return GraphRecorder(device) if device.type == "cuda" else Unrecorded()
