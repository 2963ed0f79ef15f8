"""``model.base``: the number format that the frozen base weights are kept in. Imports no torch."""

from __future__ import annotations

from importlib.util import find_spec

from tell.config_sections import ModelConfig
from tell.errors import TellError
from tell.models import machine
from tell.models.architecture import Architecture

FULL = "full"  # not quantised
MOST = 0.9  # of a GPU's free memory that weights may take
BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8}  # a weight; 4-bit blocks of 64 have a scale of 8 bits


def check_base(base: str, device: str, *, installed: bool = True) -> None:
    """Refuse quantised base weights where they cannot be used.

    Args:
        base: ``model.base``.
        device: where the model will compute.
        installed: bitsandbytes must be there too; False where a plan is made.

    Raises:
        TellError: a device other than an NVIDIA or AMD GPU, or bitsandbytes is missing.
    """
    if base == FULL:
        return
    if device != "cuda":
        raise TellError(
            f"weights in 4 or 8 bits save a GPU's memory; on {device} each product would first make them whole again, "
            "slower than with the whole weights",
            where=f"model.base={base}",
            remedy="Use model.base=full, or a machine with such a GPU (there with model.device=cuda).",
        )
    if installed and find_spec("bitsandbytes") is None:
        raise TellError(
            "needs bitsandbytes, which is not installed",
            where=f"model.base={base}",
            remedy='pip install "tell-llm[gpu]", or use model.base=full.',
        )


def check_planned_model(model: ModelConfig, *, installed: bool = True) -> None:
    """`check_base` and `machine.check_dtype` before torch is loaded, for the device that it will probably compute on.

    Raises:
        TellError: as these.
    """
    device = machine.likely_device() if model.device == "auto" else model.device
    machine.check_dtype(model.dtype, device)
    check_base(model.base, device, installed=installed)


def weight_bytes(arch: Architecture, base: str, width: int) -> float:
    """Bytes of a model's weights: matrices inside the blocks as ``base`` says, all else ``width`` bytes each."""
    if base == FULL:
        return float(width * arch.parameters)
    return arch.linear_parameters * BITS[base] / 8 + width * (arch.parameters - arch.linear_parameters)


def is_too_large(weights: float, free: float) -> bool:
    """Whether so many bytes of weights leave a GPU no room to compute."""
    return weights > MOST * free
