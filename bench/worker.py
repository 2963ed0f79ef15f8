"""The process of one engine: ``python -m bench.worker ENGINE SPEC``; talks JSON lines over its standard streams.

It reads what `bench.engines.serve` and `Meter` say, ``{"do": "stop"}`` at last, and answers each (but a stop) with one
line, ``{"error": ...}`` where it failed. What libraries print goes to the log instead.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any


class Stopped(Exception):
    """The driver wants no more of this build; raised inside the engine's own loop to leave it."""


class Channel:
    """Messages from and to the driver."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.lines = os.fdopen(os.dup(0), encoding="utf-8")

    def receive(self) -> dict[str, Any]:
        line = self.lines.readline()
        return json.loads(line) if line else {"do": "stop"}

    def send(self, **message: Any) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()


class Meter:
    """Times whole optimiser steps between the driver's commands; an engine calls `wait` once and `step` after each.

    Attributes:
        tokens: real tokens since the turn began, a number or a scalar on the device; the engine adds to it.
        model: whose trainable parameters are reported.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel, self.left, self.steps, self.begin = channel, 0, 0, 0.0
        self.tokens: Any = 0
        self.model: Any = None

    def wait(self) -> None:
        """Sleep until the next turn is asked for.

        Raises:
            Stopped: there is none.
        """
        message = self.channel.receive()
        if message["do"] == "stop":
            raise Stopped
        self.steps = self.left = message["steps"]
        self.tokens = 0
        synchronize()
        self.begin = time.perf_counter()

    def step(self) -> None:
        """A step is done; after the last one of a turn report and sleep."""
        self.left -= 1
        if self.left:
            return
        synchronize()
        seconds = time.perf_counter() - self.begin
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        facts = {"steps": self.steps, "tokens": int(self.tokens), "trainable_parameters": trainable}
        self.channel.send(seconds=seconds, **facts, **peak_memory())
        self.wait()


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def reset_peak() -> None:
    """Let peak memory begin at what is held now, so that reading the weights does not count."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not Linux: the peak of the whole process is reported
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> dict[str, float]:
    """Peaks since `reset_peak` in MB (1e6 bytes): resident memory, and on a GPU what torch held there."""
    import torch

    try:
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    out = {"peak_rss_mb": peak / 1e6}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        out["peak_cuda_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return out


def limit_memory(share: float = 0.8) -> None:
    """Fail in this process, not the machine, when a setting that is tried wants more memory than is free (Linux)."""
    try:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return
    limit = int(share * 1024 * int(line.split()[1]))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> None:
    with contextlib.suppress(OSError):  # when memory runs out in a try, this process goes first, not the user's
        Path("/proc/self/oom_score_adj").write_text("1000")
    module, spec = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    channel = Channel()
    if spec.get("trying") and spec["device"] == "cpu":
        limit_memory()
    try:
        importlib.import_module(f"bench.engines.{module}").run(channel, spec)
    except Stopped:
        pass
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        channel.send(error=f"{type(error).__name__}: {lines[0]}")
        os._exit(1)
    os._exit(0)  # nothing to save; skips minutes of teardown in some libraries


if __name__ == "__main__":
    main()
