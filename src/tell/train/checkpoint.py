"""Checkpoints of a training run: adapter, optimiser state and position, as safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tell.errors import TellError
from tell.files import atomic_folder, restore_folder
from tell.train.flat import FlatAdapters

Parameters = Mapping[str, nn.Parameter]  # trained, by name


def save_checkpoint(
    folder: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    facts: dict,
    *,
    flat: FlatAdapters | None = None,
    more: Mapping[str, Tensor] = {},  # never changed
) -> None:
    """Replace the checkpoint in ``folder`` atomically: a kill leaves the old or the new one complete.

    Args:
        folder: of the checkpoint.
        parameters: trained parameters by name.
        optimizer: AdamW over them, or over ``flat``.
        flat: the parameters as one tensor, if they are.
        facts: JSON-serialisable position: step, digest, tokens, seconds.
        more: further tensors by names that none of the others has.

    Raises:
        TellError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = state_tensors(parameters, optimizer, flat)
    tensors |= {name: tensor.cpu().contiguous() for name, tensor in more.items()}
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
    folder: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    *,
    digest: str,
    flat: FlatAdapters | None = None,
    more: Mapping[str, Tensor] = {},  # in place
) -> dict | None:
    """Restore a checkpoint's tensors, those of ``more`` too, and return its facts; None where there is no checkpoint.

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
            f"the checkpoint cannot be read ({error})", where=str(folder), remedy="Start over with --overwrite."
        ) from error
    if facts["digest"] != digest:
        raise TellError(
            "the checkpoint belongs to another mixture or other settings",
            where=str(folder),
            remedy="Resume with the settings in run.yaml, or start over with --overwrite.",
        )
    load_state(tensors, parameters, optimizer, flat)
    for name, tensor in more.items():
        tensor.copy_(tensors[name])
    return facts


def state_tensors(
    parameters: Parameters, optimizer: torch.optim.Optimizer, flat: FlatAdapters | None = None
) -> dict[str, Tensor]:
    """Weights and optimiser state on the CPU, by ``weight/<name>``, ``exp_avg/<name>`` and so on.

    The names and shapes are the same with and without ``flat``: either resumes what the other wrote.
    """
    tensors = {f"weight/{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for name, state in _states(parameters, optimizer, flat).items():
        for key, value in state.items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def _states(
    parameters: Parameters, optimizer: torch.optim.Optimizer, flat: FlatAdapters | None
) -> dict[str, dict[str, Tensor]]:
    """The optimiser's state of each parameter."""
    if flat is None:
        return {name: optimizer.state.get(p, {}) for name, p in parameters.items()}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, whole in optimizer.state.get(flat.weight, {}).items():
        parts = flat.parts(whole) if whole.dim() else {}
        for name, state in states.items():
            state[key] = parts[name] if parts else whole.clone()  # a file holds no tensor twice
    return states


def load_state(
    tensors: Mapping[str, Tensor],
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    flat: FlatAdapters | None = None,
) -> None:
    """The inverse of ``state_tensors``."""
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"weight/{name}"])
    saved = {
        name: {key: tensors[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq", "step") if f"{key}/{name}" in tensors}
        for name in parameters
    }
    owners: dict[nn.Parameter, dict[str, Tensor]] = {parameters[name]: state for name, state in saved.items() if state}
    if flat is not None:
        flat.refresh()
        owners = {flat.weight: _joined_state(saved, flat)} if owners else {}
    for p, state in owners.items():
        # a fused AdamW reads its step on the parameter's device, any other on the CPU
        places = {"step": p.device if optimizer.defaults.get("fused") else torch.device("cpu")}
        optimizer.state[p] = {key: value.to(places.get(key, p.device)) for key, value in state.items()}


def _joined_state(saved: Mapping[str, Mapping[str, Tensor]], flat: FlatAdapters) -> dict[str, Tensor]:
    """The state of one flat parameter from those of its parts; a part without one has had no gradient."""
    state = {"step": torch.stack([part["step"] for part in saved.values() if part]).max()}
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = torch.zeros_like(flat.weight.detach())
        for name, view in flat.parts(state[key]).items():
            if saved[name]:
                view.copy_(saved[name][key])
    return state
