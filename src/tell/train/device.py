"""Device-specific parts: the fast path, copies, free memory, random state."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from tell.pass_memory import host_memory

FAST_DEVICES = ("cpu", "cuda")  # where rows are packed and operations fused


def trains_fast(fast: str, device: torch.device | str) -> bool:
    """Whether ``train.fast`` means packed rows on ``device``; other devices have only the plain path."""
    return fast == "auto" and torch.device(device).type in FAST_DEVICES


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """Copies ``x`` to ``device``, asynchronously to a GPU."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait


class Fetch:
    """A tensor on its way to the CPU; the copy from a GPU goes on while further work is launched.

    Attributes:
        waits: whether ``array`` may have to wait for the device.
    """

    def __init__(self, x: Tensor) -> None:
        self.waits = x.device.type == "cuda"
        if self.waits:
            self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(x.device))
        else:
            self.host = x.cpu().clone()  # it may be written into meanwhile

    def array(self) -> np.ndarray:
        """Its values, once they have arrived."""
        if self.waits:
            self.arrived.synchronize()
        return self.host.numpy()


def kept_randomness(device: torch.device | str) -> AbstractContextManager[None]:
    """Restores the global random state of the CPU and of ``device`` at the end."""
    kind = torch.device(device)
    return torch.random.fork_rng(devices=[kind] if kind.type == "cuda" else [])


def free_bytes(device: torch.device) -> int:
    """Memory this process may still take on ``device``: the GPU's, or the machine's within its control group."""
    if device.type in ("cuda", "xpu"):
        backend = torch.cuda if device.type == "cuda" else torch.xpu
        cached = backend.memory_reserved(device) - backend.memory_allocated(device)  # cached by torch, which reuses it
        return backend.mem_get_info(device)[0] + cached
    free = host_memory()[1]
    if device.type == "mps":  # unified memory, of which Metal recommends a maximum
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return max(0, free)
