"""The stage that applies an adapter: merged into the weights, next to them, and as `adapter_applied` chooses."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.gpu.run import Run, make_model, now
from bench.gpu.speed import decoded
from bench.gpu.training import least_seconds, small_first

WAYS: dict[str, Callable[..., bool] | None] = {
    "chosen": None,
    "beside": lambda *_: False,
    "merged": lambda *_: True,
}
"""What `is_merged` says instead of its own rule; what is chosen comes first, so that it pays for what only the first
time costs."""


def merge(run: Run) -> dict[str, Any]:
    """Seconds and memory to apply an adapter and remove it, and decoding meanwhile, each way; the big model first."""
    stage = run.stages.setdefault("merge", {})
    for size in reversed(small_first(run.sizes)):
        out = stage.setdefault(size, {})
        if out.keys() >= WAYS.keys() or run.late(f"merge {size}", least_seconds(size)):
            continue
        try:
            _merge(run, size, out)
        except Exception as error:
            run.failed(out, "model", error)
        run.clear()
    return stage


def _merge(run: Run, size: str, out: dict[str, Any]) -> None:
    from tell.config_sections import TrainConfig
    from tell.decode.engine import Engine
    from tell.train import lora

    model = make_model(size, run.device, torch.bfloat16)
    tuned = lora.add_lora(model, TrainConfig(lora_dropout=0.0), seed=1)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(tuned, Path(folder))
        lora.remove_lora(tuned)
        del tuned
        before, engine = _fingerprints(model), Engine(model, device=run.device, max_positions=8192)
        for where, rule in WAYS.items():
            if where in out or run.late(f"adapter {size}, {where}", least_seconds(size) / 3):
                continue
            try:
                with patch.object(lora, "is_merged", rule) if rule else nullcontext():
                    _apply(run, engine, Path(folder), before, f"{size}, {where}", out)
            except Exception as error:
                run.failed(out, where, error)
            run.save()


def _apply(run: Run, engine: Any, adapter: Path, before: list[int], name: str, out: dict[str, Any]) -> None:
    """Apply an adapter one way, decode, and take it off.

    Args:
        before: the fingerprints without it.
        name: of the size and of the way.
    """
    from tell.train.unmerged import is_unmerged

    model = engine.model
    run.clear()
    held, begin = run.peak_gb(), now()
    with engine.adapter(adapter):
        run.sync()
        applied, peak = now(), run.peak_gb()
        way = "beside" if is_unmerged(model) else "merged"
        same = [x == y for x, y in zip(_fingerprints(model), before, strict=True)]
        told, _ = decoded(run, engine)
        run.sync()
        back = now()
    run.sync()
    ended = now()
    exact = _fingerprints(model) == before
    more = None if held is None or peak is None else round(peak - held, 2)
    where = name.rpartition(", ")[2]
    out[where] = {
        "way": way, "apply_s": round(applied - begin, 3), "remove_s": round(ended - back, 3), "more_gb": more,
        **told,
    }  # fmt: skip
    touched = all(same) if way == "beside" else not any(same)
    good = exact and touched and where in ("chosen", way) and (more is None or way != "beside" or more < 1)
    run.find(f"adapter {name}", {**out[where], "exact": exact, "weights changed": not all(same)}, good=good)


def _fingerprints(model: Any) -> list[int]:
    """A number for the bits of each linear layer's weight, computed where it is."""
    out = []
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                bits = module.weight.detach().flatten().view(torch.int16).long()
                out.append((bits * (torch.arange(len(bits), device=bits.device) % 65521 + 1)).sum())
    return torch.stack(out).tolist()
