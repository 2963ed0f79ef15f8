"""The seed that kernels on a GPU add to their own: a captured pass draws other numbers at each replay."""

from __future__ import annotations

import torch
from torch import Tensor

_seeds: dict[torch.device, Tensor] = {}  # cache by device: captured graphs rely on their addresses


def device_seed(device: torch.device) -> Tensor:
    """(1,) int32 on ``device``, at first 0, at the same address for the whole process.

    It must not change between a forward pass and its backward pass.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _seeds:
        with torch.inference_mode(False):  # it is written into in training too
            _seeds[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _seeds[device]


def draw_seed(device: torch.device) -> None:
    """Refill the seed of a GPU, without waiting, from torch's CPU generator; due before each pass.

    Seeds that are added to it are constant on a GPU, so no pass moves the generator, whether computed, captured or
    replayed. On a CPU kernels take their seeds from the generator themselves.
    """
    if device.type == "cuda":
        drawn = torch.randint(2**31 - 1, (1,), dtype=torch.int32).pin_memory()
        device_seed(device).copy_(drawn, non_blocking=True)


def all_seeds() -> list[Tensor]:
    """The seed of each device that has one, itself."""
    return list(_seeds.values())
