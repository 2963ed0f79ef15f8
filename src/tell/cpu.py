"""``TELL_CPU=avx2``: compute as on a CPU with AVX2 and nothing newer. Imports no torch.

For tests and measurements of older CPUs on a newer one. It limits torch and its libraries, the compiler of the kernels,
and what ``models.machine`` reports about the CPU.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

from tell.errors import TellError

SWITCH = "TELL_CPU"


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction set.

    Attributes:
        name: value of the switch.
        march: what the kernels are compiled for.
        capability: what ``torch.backends.cpu.get_cpu_capability`` says under it.
        environment: variables that limit torch, oneDNN and MKL to it, read when each is first used.
    """

    name: str
    march: str
    capability: str
    environment: dict[str, str]


LEVELS = {
    "avx2": Level(
        "avx2",
        "haswell",
        "AVX2",
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "DNNL_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        },
    )
}


def cpu_level() -> Level | None:
    """The level of ``TELL_CPU``; None where it is not set.

    Raises:
        TellError: an unknown one.
    """
    name = os.environ.get(SWITCH, "").lower()
    if not name:
        return None
    if name not in LEVELS:
        raise TellError(f"{name!r} is not an instruction set", where=f"${SWITCH}", remedy="Use avx2, or unset it.")
    return LEVELS[name]


def limit_libraries(environment: MutableMapping[str, str] = os.environ) -> None:
    """Limit the numeric libraries to the level, before they are imported. ``cpu_level`` reports an unknown one."""
    level = LEVELS.get(environment.get(SWITCH, "").lower())
    if level is not None:
        environment.update(level.environment)
