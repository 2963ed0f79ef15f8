"""From the processor's memory to the device's."""

from __future__ import annotations

import torch
from torch import Tensor

FAST_DEVICES = ("cpu", "cuda")  # where rows are packed and operations fused


def trains_fast(fast: str, device: torch.device | str) -> bool:
    """Whether ``train.fast`` comes to packed rows on ``device``; other devices have the plain path alone."""
    return fast == "auto" and torch.device(device).type in FAST_DEVICES


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device``, without waiting for a GPU: neither for the copy nor for what it still computes."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait
