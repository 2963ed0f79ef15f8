"""Models larger than a GPU, for forward passes: weights that do not fit are elsewhere, and copied in at each use.

Every state, cache and plan stays on one GPU, so all that runs a model runs these too. The copies come from other GPUs
of the machine, or from its memory; a pass over many rows pays for them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")
SHARE = 0.6  # of the free memory of the GPU that computes; the rest is for states and the key-value cache
OTHERS = 0.9  # of that of the other GPUs
GB = 1e9


def rooms(main: torch.device, free: Callable[[torch.device], int]) -> dict[torch.device, float]:
    """Bytes that weights may take on each GPU, the one that computes first."""
    others = [torch.device("cuda", i) for i in range(torch.cuda.device_count()) if i != main.index]
    return {main: SHARE * free(main), **{device: OTHERS * free(device) for device in others}}


def spread(model: nn.Module, room: Mapping[torch.device, float]) -> dict[torch.device, int]:
    """Lays a model on the CPU out over devices; it computes on the first of ``room``.

    Linear layers fill the devices in the model's order, the host's memory takes the rest; all else is on the first.

    Returns:
        Bytes of weights on each device.
    """
    main = next(iter(room))
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [m for m in model.modules() if type(m) is nn.Linear and m is not output]
    inside = {id(p) for layer in linear for p in layer.parameters(recurse=False)}
    held = dict.fromkeys((*room, HOST), 0)
    for tensor in _others(model, inside):
        tensor.data = tensor.data.to(main)
        held[main] += tensor.nbytes
    sizes = [sum(p.nbytes for p in layer.parameters(recurse=False)) for layer in linear]
    for layer, size, device in zip(linear, sizes, places(sizes, room, held[main]), strict=True):
        for p in layer.parameters(recurse=False):
            p.data = _pinned(p.data) if device == HOST else p.data.to(device)
        held[device] += size
        if device != main:
            _bring(layer, main)
    return held


def places(sizes: Sequence[int], room: Mapping[torch.device, float], taken: int) -> list[torch.device]:
    """The device of each layer by its bytes; ``taken`` bytes of the first device are taken already."""
    left = dict(room)
    left[next(iter(room))] -= taken
    found = []
    for size in sizes:
        found.append(next((device for device, free in left.items() if size <= free), HOST))
        if found[-1] in left:
            left[found[-1]] -= size
    return found


def _others(model: nn.Module, inside: set[int]) -> Iterable[Tensor]:
    parameters = {id(p): p for p in model.parameters() if id(p) not in inside}
    return [*parameters.values(), *model.buffers()]


def _pinned(weight: Tensor) -> Tensor:
    """In pinned memory, which a GPU reads several times as fast, where the system allows it."""
    try:
        return weight.pin_memory() if torch.cuda.is_available() else weight
    except RuntimeError:  # the system's limit
        return weight


def _bring(layer: nn.Linear, main: torch.device) -> None:
    """Copy the layer's weights to ``main`` for each of its forward passes.

    Hooks, so that fused operations, which read weights themselves, leave the layer to its own forward.
    """
    at_home: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}  # by module, which may be a copy of the layer

    def bring(module: nn.Module, _: object) -> None:
        at_home[module] = [(p, p.data) for p in module.parameters(recurse=False)]
        with torch.inference_mode(False), torch.no_grad():  # a parameter takes no tensor of inference mode
            for p, home in at_home[module]:
                p.data = home.to(main, non_blocking=True)

    def put_back(module: nn.Module, *_: object) -> None:
        for p, home in at_home.pop(module, ()):
            p.data = home

    layer.register_forward_pre_hook(bring)
    layer.register_forward_hook(put_back, always_call=True)


def told(held: Mapping[torch.device, int]) -> str:
    """A sentence for the user."""
    main, *others = held
    parts = [f"{held[device] / GB:.1f} GB {_place(device)}" for device in others if held[device]]
    return f"{held[main] / GB:.1f} GB of the weights are on {main}, {', '.join(parts)}, copied in at each use"


def _place(device: torch.device) -> str:
    return "in the machine's memory" if device == HOST else f"on {device}"
