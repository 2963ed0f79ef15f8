"""``python -m bench.gpu.counts``: launches and saved bytes of a training step, counted without a GPU.

A whole step runs on torch's meta device, with the real shapes of a model and random rows: every operation that would
launch a kernel is counted, a Triton kernel as one; views and allocations are not. Attention is torch's own for packed
rows, one launch a way. Times are not known this way.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.gpu import run
from tell.config_sections import TrainConfig
from tell.kernels import ops
from tell.kernels.triton_ops import TritonKernels
from tell.train import flat, packing
from tell.train import step as training
from tell.train.fast import fused, stacked
from tell.train.fast.cuda import VarlenPlan, _torch_varlen
from tell.train.lora import a_scales, add_lora
from tell.train.update import Update

ROWS = 16
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}


class Launches(TorchDispatchMode):
    """Counts what launches on the meta device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        on_device = any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs, out)))
        if on_device and name not in ALLOCATIONS and not _is_view(func):
            self.names[name] += 1
        return out


def _is_view(func: Any) -> bool:
    results = func._schema.returns
    return bool(results) and all(r.alias_info is not None and not r.alias_info.is_write for r in results)


class CountedKernels(TritonKernels):
    """Triton's kernels, which are only counted."""

    def __init__(self, names: Counter[str]) -> None:
        kernels = "rmsnorm rmsnorm_back gated gated_back heads heads_back cross_entropy dropout"
        super().__init__(SimpleNamespace(**{name: name for name in kernels.split()}))  # type: ignore[arg-type]
        self.names = names

    def launch(self, kernel: Any, grid: tuple[int, ...], first: Tensor, *rest: object, **options: object) -> None:
        self.names[f"triton {kernel}"] += 1


@dataclass
class Saved:
    """Bytes that autograd keeps for the backward pass, each storage once; parameters are not counted."""

    own: set[int]
    storages: dict[int, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # no storage is freed and its address used again

    def pack(self, x: Tensor) -> Tensor:
        place = x.untyped_storage()
        if x.is_meta and place._cdata not in self.own:
            self.storages[place._cdata] = place.nbytes()
            self.kept.append(x)
        return x

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@dataclass(frozen=True)
class Step:
    """What one step of ``layers`` layers launches and keeps.

    Attributes:
        tokens: real tokens of its rows.
        names: launches by name.
        saved: bytes kept between the passes.
    """

    layers: int
    tokens: int
    names: Counter[str]
    saved: int

    @property
    def launches(self) -> int:
        return self.names.total()


@contextmanager
def counted(names: Counter[str]) -> Iterator[None]:
    """The meta device takes the path of a GPU; no module is tried, since its numbers are not there to compare."""

    def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
        names["addmm in fp32"] += 1  # which torch has for CUDA alone

    plan = partial(VarlenPlan, find=lambda query, value: _torch_varlen())
    with ExitStack() as stack:
        stack.enter_context(patch.dict(ops.BACK_ENDS, {"meta": lambda x: CountedKernels(names)}))
        stack.enter_context(patch.object(fused, "_same", lambda a, b: True))
        stack.enter_context(patch.object(packing, "packed_plan", plan))
        stack.enter_context(patch.object(training.Body, "_check", lambda self, model: None))
        stack.enter_context(patch.object(stacked, "add_product", add_product))
        yield


def count_step(
    size: str,
    layers: int,
    *,
    kernels: bool = True,
    config: TrainConfig | None = None,
    rows: int = ROWS,
) -> Step:
    """A step of a model cut to ``layers`` layers: one pass forward and back, clipping and AdamW.

    Args:
        size: of ``bench.gpu.run.SIZES``.
        kernels: False: the modules' own forwards, each adapter matrix for itself, and nothing after the backward pass:
            torch's loops over parameters on the meta device are not those of a GPU.
        config: of the adapters.
        rows: of the step.
    """
    launches = Launches()
    with patch.dict(run.SIZES[size], {"num_hidden_layers": layers}), counted(launches.names):
        if not kernels:
            ops.BACK_ENDS.pop("meta")
        config = config or TrainConfig(lora_dropout=0.0)
        model = add_lora(run.make_model(size, "meta", torch.bfloat16), config, seed=1)
        body = training.Body(model)
        group = run.train_rows(run.rows_for(size, rows, 1.0))
        rules, parameters = training.StepRules(), {name: p for name, p in model.named_parameters() if p.requires_grad}
        joined = flat.FlatAdapters(parameters, a_scales(model), torch.bfloat16) if kernels else None
        update = Update(parameters, config, torch.bfloat16, joined)
        with torch.no_grad():
            body.states(packing.pack(group, share_prefix=False, device=body.device))  # joins the layers' weights
        launches.names.clear()
        saved = Saved({p.untyped_storage()._cdata for p in model.parameters()})
        with launches, saved_tensors_hooks(saved.pack, lambda x: x):
            batch = packing.pack(group, share_prefix=False, device=body.device)
            weights = rules.weights(group, torch.tensor(rules.total(group))).to("meta")
            loss, _ = training.pass_loss(body, batch, weights)
            loss.backward()
            if kernels:
                update.clip()
                update.apply(1e-4)
    return Step(layers, batch.real, launches.names, saved.bytes)


def extrapolated(size: str, few: int = 2, more: int = 3, **options: Any) -> tuple[float, float]:
    """Launches of a whole step, and bytes kept per token and layer, from two small models: both grow by the layer."""
    a, b = (count_step(size, n, **options) for n in (few, more))
    layers = run.SIZES[size]["num_hidden_layers"]
    each = (b.launches - a.launches) / (more - few)
    return a.launches + each * (layers - few), (b.saved - a.saved) / (more - few) / a.tokens


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.gpu.counts", description=__doc__)
    p.add_argument("--sizes", default="smollm2-135m,llama3-8b", help=f"of {','.join(run.SIZES)}")
    p.add_argument("--names", action="store_true", help="also what one layer launches")
    a = p.parse_args()
    for size in a.sizes.split(","):
        for kernels in (False, True):
            launches, each = extrapolated(size, kernels=kernels)
            path = "Triton's kernels" if kernels else "modules' own forwards"
            print(f"{size:14} {path:22} {launches:7.0f} launches a step {each / 1024:8.1f} KiB a token and layer")
        if a.names:
            few, more = (count_step(size, n).names for n in (2, 3))
            print("  one layer:", ", ".join(f"{name} {n}" for name, n in (more - few).most_common()))


if __name__ == "__main__":
    main()
