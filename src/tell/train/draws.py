"""The seed that kernels on a GPU read from the device: a captured pass draws other numbers at each replay."""

from __future__ import annotations

import torch
from torch import Tensor

from tell.train.device import send

_seeds: dict[torch.device, Tensor] = {}  # cache by device: captured graphs rely on their addresses


def device_seed(device: torch.device) -> Tensor:
    """(1,) int64 on ``device``, at the same address for the whole process; kernels add their own number to it."""
    if device not in _seeds:
        with torch.inference_mode(False):  # it is written into in training too
            _seeds[device] = torch.zeros(1, dtype=torch.int64, device=device)
    return _seeds[device]


def draw_seed(device: torch.device) -> None:
    """Refill the seed of a GPU, without waiting, from torch's CPU generator; due before each pass.

    On a CPU kernels take their seeds from the generator themselves.
    """
    if device.type == "cuda":
        device_seed(device).copy_(send(torch.randint(2**31, (1,)), device))
