"""An adapter merged into its base model's files, a shard at a time: no more memory than one shard of weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tell.errors import TellError
from tell.files import read_json, write_json
from tell.folder import AdapterFolder
from tell.models.architecture import weight_files

if TYPE_CHECKING:
    from torch import Tensor

SHARD = 2 << 30  # bytes of a file that is written
Pair = "tuple[Tensor, Tensor]"


def write_merged(
    base: Path,
    adapter: AdapterFolder,
    folder: Path,
    *,
    shard: int = SHARD,
    advance: Callable[[float], None] = lambda n: None,
) -> int:
    """Write the merged weights as safetensors, each rounded once from fp32 to its own dtype.

    Tensors that the adapter leaves alone are copied, so that tied embeddings stay one tensor.

    Args:
        base: folder of the base model.
        shard: bytes of a file at most, but for a tensor that is larger.
        advance: called with the bytes of each tensor.

    Returns:
        The number of layers merged.

    Raises:
        TellError: the adapter is damaged, or adapts what the base lacks.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from tell.train.adapter_file import REMEDY, read_adapter

    scale, pairs = read_adapter(adapter.root)
    transposed = bool(read_json(adapter.config, remedy=REMEDY).get("fan_in_fan_out"))  # GPT-2 keeps (in, out)
    files = weight_files(base)
    sizes = {key: (file, size) for file in files for key, size in tensor_sizes(file).items()}
    adapted = _by_key(pairs, list(sizes), adapter.root)
    groups = list(_groups({key: size for key, (_, size) in sizes.items()}, shard))
    where: dict[str, str] = {}
    for number, keys in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for key in keys:
            file, size = sizes[key]
            with safe_open(file, framework="pt") as held, torch.no_grad():
                weight = held.get_tensor(key)
            if key in adapted:
                weight = _merged(weight, *pairs[adapted[key]], scale, transposed, key)
            tensors[key], where[key] = weight.contiguous(), name
            advance(size)
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(groups) > 1:
        total = sum(size for _, size in sizes.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return len(adapted)


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, transposed: bool, key: str) -> Tensor:
    """``W + s B A`` in fp32, in the dtype of ``W``; the same arithmetic as where `tell.train.lora` merges."""
    product = (b.float() @ a.float()).mul_(scale)
    if transposed:
        product = product.t()
    if product.shape != weight.shape:
        what = f"adapts {key} as {tuple(product.shape)}, and the base has {tuple(weight.shape)}"
        raise TellError(what, where="the adapter", remedy="Use its own base model.")
    product += weight
    return product.to(weight.dtype)


def _by_key(pairs: Mapping[str, object], keys: Sequence[str], where: Path) -> dict[str, str]:
    """The adapter's module of each tensor that it adapts.

    Files name a tensor as the model does, or without the model's own prefix (GPT-2: ``h.0.attn.c_attn.weight``).

    Raises:
        TellError: a module has no tensor in the files, or several.
    """
    known, found = set(keys), {}
    for module in pairs:
        key = f"{module}.weight"
        if key not in known:
            near = [k for k in keys if k.endswith(f".{key}") or key.endswith(f".{k}")]
            if len(near) != 1:
                raise TellError(
                    f"adapts {module}, which the files of the base name otherwise",
                    where=str(where),
                    remedy="Use --to adapter or --to vllm.",
                )
            key = near[0]
        found[key] = module
    return found


def _groups(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Consecutive tensors of at most ``most`` bytes together, a larger one alone."""
    group: list[str] = []
    total = 0
    for key, size in sizes.items():
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append(key)
        total += size
    if group:
        yield group


def tensor_sizes(file: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, from its header."""
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        if length > min(100 << 20, file.stat().st_size):
            raise TellError("is not readable as safetensors", where=str(file), remedy="Fetch the file again.")
        header = json.loads(data.read(length))
    return {k: v["data_offsets"][1] - v["data_offsets"][0] for k, v in header.items() if k != "__metadata__"}
