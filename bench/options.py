"""What a run of the benchmark is asked to do, and what it runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tell.errors import TellError
from tell.models import machine
from tell.models.find import ModelFiles, find_model
from tell.models.load import choose_device, choose_dtype

PARTS = ("train", "decode", "plan")
PEERS = ("trl", "transformers", "llamafactory", "swift")
DECODE_PEERS = ("transformers",)
RANK, ALPHA, LEARNING_RATE = 8, 32, 1e-4


@dataclass(frozen=True, slots=True)
class Options:
    """Arguments of ``python -m bench``, see its --help."""

    only: tuple[str, ...] = PARTS
    peers: tuple[str, ...] = PEERS
    model: str = "smollm2-135m"
    device: str = "auto"
    seed: int = 42
    turns: int = 3
    steps: int = 2
    warmup: int = 1
    batch: int = 16
    decode_turns: int = 2
    prompts: int = 128
    decode_batch: int = 64
    plan_rows: int = 52_002
    length_scale: float = 1.0
    ceiling_seconds: float = 5.0
    tune_peers: bool = False
    plain: bool = True


@dataclass(frozen=True, slots=True)
class Bench:
    """Options with what follows from them: the model's files, device and number format, and a folder to work in."""

    options: Options
    files: ModelFiles
    device: str
    dtype_name: str
    folder: Path

    def spec(self, **more: Any) -> dict[str, Any]:
        """What every worker is told."""
        return {
            "model": str(self.files.path),
            "device": self.device,
            "dtype": {"bf16": "bfloat16", "fp32": "float32"}[self.dtype_name],
            "dtype_name": self.dtype_name,
            "seed": self.options.seed,
            "batch": self.options.batch,
            "rank": RANK,
            "alpha": ALPHA,
            "learning_rate": LEARNING_RATE,
            **more,
        }

    def key(self, part: str, engine: str) -> str:
        """Name under which the best settings of an engine are kept."""
        o = self.options
        work = [self.files.fingerprint, f"batch {o.batch}", f"scale {o.length_scale:g}"]
        place = [machine.cpu_name(), str(machine.cores()), self.device, self.dtype_name]
        return " | ".join([part, engine, *place, *work])


def require_positive(given: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse counts below 1.

    Raises:
        TellError: names the argument.
    """
    for name in names:
        if given[name] < 1:
            raise TellError(f"{given[name]} is too few", where=f"--{name.replace('_', '-')}", remedy="Give 1 or more.")


def prepare(options: Options, folder: Path) -> Bench:
    """Find the model and choose device and number format as ``tell tune`` does.

    Raises:
        TellError: no such model or device.
    """
    files = find_model(options.model)
    device = choose_device(options.device)
    dtype, _ = choose_dtype("auto", device)
    return Bench(options, files, device.type, "bf16" if "bfloat16" in str(dtype) else "fp32", folder)
