"""Loads a model's weights, and explains the choice of number format."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from tell.config_sections import DEVICES
from tell.cpu import SWITCH, cpu_level
from tell.errors import TellError, first_line, is_panic
from tell.models import machine
from tell.models.find import ModelFiles

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(slots=True)
class Loaded:
    """A model ready to be run, or to get an adapter.

    Attributes:
        model: in evaluation mode, no parameter requires a gradient.
        dtype: of the weights.
        device: of the weights.
        why: sentence for the user, ``"bf16: the CPU has avx512_bf16"``.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    device: torch.device
    why: str


def choose_device(device: str = "auto") -> torch.device:
    """``auto``: the first of ``config.DEVICES`` that torch sees.

    Raises:
        TellError: unknown name, or a device that torch does not see.
    """
    if device == "auto":
        return torch.device(next(name for name in DEVICES if _is_there(name)))
    if device not in DEVICES:
        names = ", ".join(["auto", *DEVICES])
        raise TellError(f"{device!r} is not a device", where="model.device", remedy=f"Use one of {names}.")
    if not _is_there(device):
        without = device == "cuda" and torch.version.cuda is None and torch.version.hip is None
        why = "torch is built without CUDA" if without else f"torch {torch.__version__} sees none"
        raise TellError(f"{device} was requested, but {why}", where="model.device", remedy="Use auto or cpu.")
    return torch.device(device)


def _is_there(device: str) -> bool:
    backend = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}.get(device)
    return backend is None or backend.is_available()


def choose_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format for ``device`` and the reason.

    Raises:
        TellError: unknown name.
    """
    if dtype in _DTYPES:
        return _DTYPES[dtype], f"{dtype}: as requested"
    if dtype != "auto":
        raise TellError(f"{dtype!r} is not a number format", where="model.dtype", remedy="Use auto, bf16 or fp32.")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # emulated bf16 (before Ampere) is slower than fp32
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"bf16: the GPU ({name}) has it in hardware"
        return torch.float32, f"fp32: the GPU ({name}) has no bf16 in hardware"
    if device.type == "xpu":
        return torch.bfloat16, f"bf16: the GPU ({torch.xpu.get_device_name(device)}) has it in hardware"
    if device.type == "mps":
        if machine.mps_bf16():
            return torch.bfloat16, "bf16: Metal computes in it"
        return torch.float32, "fp32: Metal computes in bf16 only from macOS 14 on"
    feature = machine.cpu_bf16()
    if feature and torch.backends.mkldnn.is_available():
        return torch.bfloat16, f"bf16: the CPU has {feature}"
    if feature:
        return torch.float32, f"fp32: the CPU has {feature}, but this torch is built without oneDNN"
    if (level := cpu_level()) is not None:
        return torch.float32, f"fp32: ${SWITCH}={level.name} leaves the CPU no bf16"
    return torch.float32, "fp32: the CPU has no bf16 in hardware"


def _check_level() -> None:
    """Refuse ``TELL_CPU`` where torch was initialised before tell could limit it."""
    level = cpu_level()
    found = torch.backends.cpu.get_cpu_capability()
    if level is not None and found != level.capability:
        raise TellError(
            f"is {level.name}, but torch computes with {found}",
            where=f"${SWITCH}",
            remedy="Import tell before anything computes with torch, or unset it.",
        )


def load_model(
    files: ModelFiles,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
) -> Loaded:
    """Load the safetensors of ``files`` and freeze them.

    Args:
        dtype: ``auto`` (bf16 where the hardware has it), ``bf16`` or ``fp32``.
        device: ``auto`` (a GPU when there is one) or one of ``config.DEVICES``.
        attn_implementation: one of transformers' names, or one registered with its ``AttentionInterface``; ``sdpa``
            becomes ``eager`` for families without it (Gemma 2, whose scores are capped).

    Raises:
        TellError: unknown device or dtype, ``TELL_CPU`` set too late, an architecture unknown to transformers, weights
            that do not match the configuration, not enough memory.
    """
    _check_level()
    where = choose_device(device)
    kind, why = choose_dtype(dtype, where)
    remedy = "Fetch the model again, or update transformers (pip install -U transformers)."
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.path,
                dtype=kind,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                # by default transformers uses sdpa where it can, but it refuses sdpa by name where it cannot
                attn_implementation=None if attn_implementation == "sdpa" else attn_implementation,
                output_loading_info=True,
            )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:  # transformers would fill them with random numbers and only warn
            raise TellError(
                f"its weights lack {len(missing)} tensors, first {missing[0]}", where=str(files.path), remedy=remedy
            )
        model = model.to(where)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TellError(
            f"{files.architecture.parameters / 1e6:,.0f} M parameters do not fit into the memory of {where}",
            where=files.name,
            remedy="Use a smaller model, or model.device=cpu.",
        ) from error
    except BaseException as error:  # transformers and safetensors raise many kinds of exceptions on damaged files
        if isinstance(error, TellError) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise TellError(f"cannot be loaded ({first_line(error)})", where=str(files.path), remedy=remedy) from error
    model.eval().requires_grad_(False)
    return Loaded(model, kind, where, why)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences progress bars and warnings of transformers; the relevant ones are raised above."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
