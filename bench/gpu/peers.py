"""Trainings by transformers with peft, TRL, Liger and Unsloth over the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from bench.gpu import runners
from bench.gpu.run import Run, make_model, rows_for
from bench.gpu.training import least_seconds, plan_for, small_first
from bench.rows import Rows


def peers(run: Run) -> dict[str, Any]:
    """transformers and peft over the same rows; first what was fastest, for the ratio is to the best."""
    ways: dict[str, dict[str, Any]] = {f"peft, padded x{n}": {"micro_rows": n} for n in (16, 4)}
    ways["peft, padded x4, checkpointing"] = {"micro_rows": 4, "checkpointing": True}
    return compare(run, "peers", {name: partial(_peft, **options) for name, options in ways.items()})


def liger(run: Run) -> dict[str, Any]:
    """Peers with Liger's patch, which stays in this process."""
    if not installed(run, "liger", "liger_kernel"):
        return {}
    from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen3

    apply_liger_kernel_to_llama()
    apply_liger_kernel_to_qwen3()
    ways: dict[str, Any] = {f"peft and liger, padded x{n}": partial(_peft, micro_rows=n) for n in (16, 4)}
    if installed(run, "liger", "trl"):
        ways["trl and liger, packing"] = partial(runners.trl, way="packing", liger=True)
    return compare(run, "liger", ways)


def trl(run: Run) -> dict[str, Any]:
    """TRL's SFTTrainer over the same rows."""
    if not installed(run, "trl", "trl"):
        return {}
    return compare(run, "trl", {f"trl, {way}": partial(runners.trl, way=way) for way in ("packing", "padding_free")})


def unsloth(run: Run) -> dict[str, Any]:
    """Unsloth over the same rows; it patches transformers for the rest of the process."""
    if not installed(run, "unsloth", "unsloth"):
        return {}
    return compare(
        run, "unsloth", {f"unsloth, padded x{n}": partial(runners.unsloth, micro_rows=n) for n in (16, 4)}, slow=4
    )


def installed(run: Run, stage: str, package: str) -> bool:
    """Whether a peer can be imported; says so where not."""
    found = find_spec(package) is not None
    if not found:
        run.find(stage, f"{package} is not installed")
    return found


def _peft(run: Run, model: Any, rows: Rows, plan: runners.Plan, **options: Any) -> runners.Timed:
    return runners.padded(run, runners.lora(model), rows, plan, **options)


def compare(
    run: Run, stage: str, ways: Mapping[str, Callable[..., runners.Timed]], *, slow: float = 1
) -> dict[str, Any]:
    """Each peer with a model of its own, at every size; ``slow``: how many times as long as others it takes to load."""
    out = run.stages.setdefault(stage, {})
    for name, way in ways.items():
        for size in small_first(run.sizes):
            key = f"{size}: {name}"
            if key in out or run.late(key, slow * least_seconds(size)):
                continue
            plan = plan_for(run, size, graphs=False)
            rows = rows_for(size, plan.rows, run.scale)
            run.clear()
            try:
                timed = way(run, make_model(size, run.device, torch.bfloat16), rows, plan)
                out[key] = {**timed.facts(rows, plan), "peak_gb": run.peak_gb()}
                run.find(key, out[key])
            except Exception as error:  # out of memory, most likely: the next one may fit
                run.failed(out, key, error, good=True)
            run.clear()
            run.save()
    return out
