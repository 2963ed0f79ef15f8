"""This machine's CPU, cores, devices and number formats. Imports no torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tell.cpu import cpu_level
from tell.errors import TellError
from tell.pass_memory import host_memory

BF16_CAPABILITY = 8.0  # of a GPU: Ampere
FP16_CAPABILITY = 7.0  # Volta, the first with tensor cores; most of those before compute slower in fp16


def cpu_bf16() -> str | None:
    """The CPU feature that multiplies bf16 matrices (``"avx512_bf16"``, ``"amx_bf16"``, ...), or None.

    Raises:
        TellError: ``TELL_CPU`` has an unknown value.
    """
    return None if cpu_level() else _bf16_feature()


@cache
def _bf16_feature() -> str | None:
    system = platform.system()
    if system == "Linux":
        flags = _cpuinfo().get("flags") or _cpuinfo().get("Features") or ""
        present = set(flags.split())
        return next((flag for flag in ("amx_bf16", "avx512_bf16", "svebf16", "bf16") if flag in present), None)
    if system == "Darwin":
        done = subprocess.run(["sysctl", "-n", "hw.optional.arm.FEAT_BF16"], capture_output=True, text=True)
        return "FEAT_BF16" if done.stdout.strip() == "1" else None
    return None  # elsewhere detecting it needs a driver or assembler


def cpu_name() -> str:
    """``"AMD EPYC 9R14"`` or what the system reports, and the level that ``TELL_CPU`` limits it to."""
    level = cpu_level()
    return f"{_model_name()} ({level.name})" if level else _model_name()


@cache
def _model_name() -> str:
    if platform.system() == "Darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return done.stdout.strip() or platform.machine()
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores this process may use, by affinity and a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no control groups, so no quota
    return count


class Place(NamedTuple):
    """Where a model computes: one of ``config.DEVICES``, and ``"bf16"``, ``"fp16"`` or ``"fp32"``."""

    device: str
    dtype: str


def likely_place(device: str = "auto", dtype: str = "auto") -> Place:
    """``model.device`` and ``model.dtype`` resolved as far as possible without torch, which decides at loading."""
    device = likely_device() if device == "auto" else device
    return Place(device, likely_dtype(device) if dtype == "auto" else dtype)


def likely_device() -> str:
    """The resolution of ``device="auto"``, by the drivers present."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not hidden and (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        return "cuda"
    if Path("/dev/dri").exists() and "xpu" in _torch_version():
        return "xpu"
    return "mps" if (platform.system(), platform.machine()) == ("Darwin", "arm64") else "cpu"


@cache
def gpu() -> tuple[str, float | None]:
    """Name and compute capability of the first GPU a process sees, ``("Tesla T4", 7.5)``; None where it is unknown."""
    chosen = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0].strip()
    ask = ["nvidia-smi", "-i", chosen, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
        name, capability = done.stdout.strip().splitlines()[0].rsplit(",", 1)
        return name.strip(), float(capability)
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return f"GPU of {cpu_name()}", None


def gpu_memory() -> tuple[float, float] | None:
    """Bytes of the first GPU a process sees, and those of them that are free; None where they are unknown."""
    chosen = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0].strip()
    ask = ["nvidia-smi", "-i", chosen, "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
        total, free = (float(value) * 2**20 for value in done.stdout.strip().splitlines()[0].split(","))
        return total, free
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return None


_memory: dict[str, tuple[float, float] | None] = {}  # cache by device: the last reading before anything was loaded


def device_memory(device: str) -> tuple[float, float] | None:
    """Bytes of the memory a model computes in, and those free before this process loaded any; None where unknown.

    A process that has imported torch may hold a model: it goes by its last reading before, if any.
    """
    if "torch" not in sys.modules or device not in _memory:
        _memory[device] = gpu_memory() if device == "cuda" else host_memory() if device == "cpu" else None
    return _memory[device]


def check_dtype(dtype: str, device: str) -> None:
    """Refuse a number format that ``device`` does not train in.

    Raises:
        TellError: fp16 elsewhere than on a GPU of CUDA.
    """
    if dtype == "fp16" and device != "cuda":
        why = f"fp16 was requested, but training in it on {device} is not supported"
        raise TellError(why, where="model.dtype", remedy="Use auto, bf16 or fp32.")


def likely_dtype(device: str) -> str:
    """The resolution of ``dtype="auto"``: ``"bf16"``, ``"fp16"`` or ``"fp32"``."""
    if device == "cuda":
        capability = gpu()[1] or BF16_CAPABILITY
        if capability >= BF16_CAPABILITY:
            return "bf16"
        return "fp16" if capability >= FP16_CAPABILITY else "fp32"
    if device == "mps":
        return "bf16" if mps_bf16() else "fp32"
    return "bf16" if device == "xpu" or cpu_bf16() else "fp32"


def mps_bf16() -> bool:
    """Whether Metal computes in bf16 here: from macOS 14 on."""
    version = platform.mac_ver()[0].split(".")[0]
    return version.isdigit() and int(version) >= 14


def _torch_version() -> str:
    """``"2.13.0+xpu"``: the suffix names the backend."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


@cache
def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    values: dict[str, str] = {}
    for key, value in pairs:
        values.setdefault(key.strip(), value.strip())
    return values
