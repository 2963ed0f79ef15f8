"""Checkpoints of a training run: adapter, optimiser state and position, as safetensors and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tell.errors import TellError
from tell.files import atomic_folder, restore_folder


def save_checkpoint(folder: Path, parameters: dict[str, torch.nn.Parameter], optimizer: Any, facts: dict) -> None:
    """Write ``folder`` so that a kill leaves the old or the new checkpoint whole.

    Args:
        folder: the checkpoint's place.
        parameters: trained parameters by name.
        optimizer: AdamW over them.
        facts: JSON-serialisable position: step, digest, tokens, seconds.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = state_tensors(parameters, optimizer)
    try:
        with atomic_folder(folder) as temporary:
            save_file(tensors, str(temporary / "state.safetensors"))
            (temporary / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise TellError(
            f"cannot write a checkpoint ({getattr(error, 'strerror', None) or error})",
            where=str(folder),
            remedy="Free disk space, then run again with --resume.",
        ) from error


def load_checkpoint(
    folder: Path, parameters: dict[str, torch.nn.Parameter], optimizer: Any, *, digest: str
) -> dict | None:
    """Put a checkpoint's tensors back; its facts, or None where there is no checkpoint.

    Raises:
        TellError: the checkpoint belongs to another mixture or configuration, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    restore_folder(folder)
    if not (folder / "facts.json").exists():
        return None
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        tensors = load_file(str(folder / "state.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise TellError(
            f"the checkpoint cannot be read ({error})", where=str(folder), remedy="Start anew with --overwrite."
        ) from error
    if facts["digest"] != digest:
        raise TellError(
            "the checkpoint belongs to another mixture or other settings",
            where=str(folder),
            remedy="Resume with the settings in run.yaml, or start anew with --overwrite.",
        )
    put_state(tensors, parameters, optimizer)
    return facts


def state_tensors(parameters: dict[str, torch.nn.Parameter], optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights and optimiser state on the processor, by ``weight/<name>``, ``exp_avg/<name>`` and so on."""
    tensors = {f"weight/{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def put_state(tensors: dict[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter], optimizer: Any) -> None:
    """Put back what ``state_tensors`` took."""
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"weight/{name}"])
            # a fused AdamW reads its step on the parameter's device, any other on the CPU
            places = {"step": p.device if optimizer.defaults.get("fused") else torch.device("cpu")}
            state = {
                key: tensors[f"{key}/{name}"].to(places.get(key, p.device))
                for key in ("exp_avg", "exp_avg_sq", "step")
                if f"{key}/{name}" in tensors
            }
            if state:
                optimizer.state[p] = state
