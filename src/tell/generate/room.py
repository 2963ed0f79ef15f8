"""How many rows may be decoded at once in the memory there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch

SHARE = 4  # the cache of keys and values takes at most one in so many free bytes


def token_bytes(config: Any, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers of a transformers text configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * itemsize


def free_bytes(device: torch.device) -> int:
    """Memory this process may still take on ``device``: the GPU's, or the machine's within its control group."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch gives it out again
        return torch.cuda.mem_get_info(device)[0] + kept
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        held = int((group / "memory.current").read_text())
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - held + int(files["inactive_file"]))  # cached files make room
    except (OSError, ValueError, KeyError):
        pass  # no control group, or one without a limit
    return max(0, free)


def rows_that_fit(wanted: int, capacity: int, bytes_a_token: int, free: int) -> int:
    """``wanted`` rows of ``capacity`` tokens, or as many as a share of ``free`` bytes holds, at least one."""
    return max(1, min(wanted, free // SHARE // (capacity * bytes_a_token)))
