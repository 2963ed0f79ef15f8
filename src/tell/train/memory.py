"""Memory that is free on a device."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

SHARE = 4  # a cache of keys and values, or a copy of weights, takes at most one in so many free bytes


def free_bytes(device: torch.device) -> int:
    """Memory this process may still take on ``device``: the GPU's, or the machine's within its control group."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch gives it out again
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "xpu":
        kept = torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)
        return torch.xpu.mem_get_info(device)[0] + kept
    free = psutil.virtual_memory().available
    if device.type == "mps":  # the machine's own memory, of which Metal wants to use so much
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        held = int((group / "memory.current").read_text())
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - held + int(files["inactive_file"]))  # cached files make room
    except (OSError, ValueError, KeyError):
        pass  # no control group, or one without a limit
    return max(0, free)
