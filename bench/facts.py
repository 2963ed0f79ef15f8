"""What a figure needs beside it: machine and versions."""

from __future__ import annotations

import os
import platform
from typing import Any

from bench.engines.serve import versions
from bench.options import ALPHA, RANK, Bench
from tell import __version__
from tell.models import machine


def facts(bench: Bench) -> dict[str, Any]:
    """Machine, versions and the work that all engines were given."""
    import torch

    options = bench.options
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "machine": {
            "cpu": machine.cpu_name(),
            "cores": machine.cores(),
            "bf16": machine.cpu_bf16(),
            "memory_gb": round(memory / 1e9, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name() if bench.device == "cuda" else "cpu",
        },
        "versions": {"tell": __version__, "python": platform.python_version(), **versions()},
        "model": bench.files.name,
        "dtype": bench.dtype_name,
        "lora": {"rank": RANK, "alpha": ALPHA, "dropout": 0, "targets": "all-linear"},
        "rows_a_step": options.batch,
        "steps_a_turn": options.steps,
        "turns": options.turns,
        "seed": options.seed,
        "length_scale": options.length_scale,
    }
