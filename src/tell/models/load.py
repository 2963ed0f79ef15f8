"""Loads a model's weights, and explains the choice of number format."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from tell.config_sections import DEVICES
from tell.cpu import SWITCH, cpu_level
from tell.errors import TellError, first_line, is_panic
from tell.models import machine
from tell.models.base import FULL, check_base, is_too_large, weight_bytes
from tell.models.find import ModelFiles
from tell.models.spread import rooms, spread, told

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(slots=True)
class Loaded:
    """A model ready to be run, or to get an adapter.

    Attributes:
        model: in evaluation mode, no parameter requires a gradient.
        dtype: of the weights, and of what quantised weights are made into.
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
        TellError: unknown name, or fp16 elsewhere than on an NVIDIA GPU.
    """
    machine.check_dtype(dtype, device.type)
    if dtype in DTYPES:
        return DTYPES[dtype], f"{dtype}: as requested"
    if dtype != "auto":
        remedy = "Use auto, bf16, fp16 or fp32."
        raise TellError(f"{dtype!r} is not a number format", where="model.dtype", remedy=remedy)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # emulated bf16 (before Ampere) is slower than fp32
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"bf16: the GPU ({name}) has it in hardware"
        if torch.cuda.get_device_capability(device)[0] >= machine.FP16_CAPABILITY:
            return torch.float16, f"fp16: the GPU ({name}) has it in hardware, and no bf16; the loss is scaled"
        return torch.float32, f"fp32: the GPU ({name}) has neither bf16 nor fast fp16"
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
    base: str = FULL,
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
) -> Loaded:
    """Load the safetensors of ``files`` and freeze them.

    On CUDA each tensor is read straight to the GPU: the machine's memory need not hold the model. One too large for
    the GPU that is not quantised is read to the machine's memory, and laid out over other GPUs and that.

    Args:
        dtype: ``auto`` (bf16 where the hardware has it), ``bf16``, ``fp16`` or ``fp32``.
        device: ``auto`` (a GPU when there is one) or one of ``config.DEVICES``.
        base: ``full``, or ``nf4`` or ``int8`` for linear layers quantised as they are read.
        attn_implementation: one of transformers' names, or one registered with its ``AttentionInterface``; ``sdpa``
            becomes ``eager`` for families without it (Gemma 2, whose scores are capped).

    Raises:
        TellError: unknown device or dtype, ``TELL_CPU`` set too late, an architecture unknown to transformers, weights
            that do not match the configuration, not enough memory, a quantised base elsewhere than on a GPU.
    """
    _check_level()
    where = choose_device(device)
    check_base(base, where.type)
    kind, why = choose_dtype(dtype, where)
    if dtype == "auto" and kind == torch.float16 and files.architecture.model_type.startswith("gemma"):
        kind, why = torch.float32, "fp32: Gemma's activations overflow in fp16, and the GPU has no bf16"
    remedy = "Fetch the model again, or update transformers (pip install -U transformers)."
    options = {
        "trust_remote_code": trust_remote_code,
        # by default transformers uses sdpa where it can, but it refuses sdpa by name where it cannot
        "attn_implementation": None if attn_implementation == "sdpa" else attn_implementation,
    }
    large = _is_too_large(files, kind, where, base)
    if large and base != FULL:
        raise _no_room(files, where)
    try:
        with quiet():
            model, info, share = read_weights(files.path, kind, base, options | ({} if large else placed(where)))
        missing = sorted(info["missing_keys"])
        if missing:  # transformers would fill them with random numbers and only warn
            raise TellError(
                f"its weights lack {len(missing)} tensors, first {missing[0]}", where=str(files.path), remedy=remedy
            )
        if large:
            why += f"; {told(spread(model, rooms(_numbered(where), _free)))}"
        else:
            model = cast(Any, model).to(where)
    except BaseException as error:  # transformers and safetensors raise many kinds of exceptions on damaged files
        if isinstance(error, TellError) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            raise _no_room(files, where) from error
        raise TellError(f"cannot be loaded ({first_line(error)})", where=str(files.path), remedy=remedy) from error
    model.eval().requires_grad_(False)
    if base != FULL:
        why += f"; base in {base}: {share:.0%} of the weights are quantised"
    return Loaded(model, kind, where, why)


def empty_model(files: ModelFiles, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of ``files``, frozen, with its weights on the meta device: to be filled by another process.

    Its buffers are as a new model has them, and no weight is read.
    """
    from accelerate import init_empty_weights

    _check_level()
    given = {"trust_remote_code": trust_remote_code}
    with quiet(), init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(files.path, local_files_only=True, **given)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **given)
    model.tie_weights()  # tied weights were moved to the meta device one by one
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def _is_too_large(files: ModelFiles, dtype: torch.dtype, device: torch.device, base: str) -> bool:
    if device.type != "cuda":
        return False
    return is_too_large(weight_bytes(files.architecture, base, dtype.itemsize), _free(_numbered(device)))


def _no_room(files: ModelFiles, device: torch.device) -> TellError:
    return TellError(
        f"{files.architecture.parameters / 1e6:,.0f} M parameters do not fit into the memory of {device}",
        where=files.name,
        remedy=f"Use a smaller model{', model.base=nf4' if device.type == 'cuda' else ''}, or model.device=cpu.",
    )


def _numbered(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def _free(device: torch.device) -> int:
    """Bytes that this process may still take on a GPU."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def placed(device: torch.device) -> dict[str, Any]:
    """transformers' option to read each tensor straight to a GPU; other devices get the model once it is whole."""
    if device.type != "cuda":
        return {}
    # by number: transformers reads in threads, whose current GPU is always the first
    return {"device_map": {"": _numbered(device)}}


def read_weights(
    folder: Path, dtype: torch.dtype, base: str, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any], float]:
    """A causal model, what transformers says about its loading, and the share of its weights that is quantised.

    Args:
        options: more of ``from_pretrained``. A quantised model stays where its ``device_map`` puts it.
    """
    if base != FULL:
        from transformers import BitsAndBytesConfig

        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        kind = four | {"bnb_4bit_compute_dtype": dtype} if base == "nf4" else {"load_in_8bit": True}
        options = options | {"quantization_config": BitsAndBytesConfig(**kind)}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    model, info = loaded
    return model, info, _settle(model) if base != FULL else 0.0


def _settle(model: PreTrainedModel) -> float:
    """Make a model that transformers quantised an ordinary one over our own layers; the share that is quantised."""
    from tell.kernels.quantised import adopt_quantised

    quantised, total = adopt_quantised(model)
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(name, None)  # transformers would refuse to move it, and peft look for bitsandbytes' layers
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if not quantised:
        raise TellError("has no linear layer to quantise", where="model.base", remedy="Use model.base=full.")
    return quantised / total


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
