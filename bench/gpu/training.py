"""Trainings by TELL's Trainer with parts of it on and off: tokens a second and memory, predicted too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu import runners
from bench.gpu.goals import BIG, SMALL
from bench.gpu.run import Run, equal_rows, make_model, quantised, rows_for, train_rows
from bench.rows import Rows
from tell.train.packing import TrainRow


@dataclass(frozen=True)
class Variant:
    """One training of TELL's.

    Attributes:
        settings: keys of ``train``; ``recompute: all`` is every layer.
        sizes: models it tells something of.
        base: ``full``, ``nf4`` or ``int8``.
        dtype: of weights and activations.
        length: of every row; None: the mixture of rows of some 150 tokens.
        gb: memory that is left to it, as on a smaller card.
        off: a part that is turned off: module and name.
        graphs: small models may capture some, which takes steps.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[str, ...] = (BIG, SMALL, "qwen3-0.6b", "tiny")
    base: str = "full"
    dtype: torch.dtype = torch.bfloat16
    length: int | None = None
    gb: float | None = None
    off: tuple[str, str] | None = None
    graphs: bool = True


AUTO = {"micro_tokens": None, "recompute": None}
JUDGED = {
    "tell": Variant({"recompute": 0}),
    "tell, recomputed": Variant({"recompute": "all"}, (BIG, "tiny")),
    "tell, 24 GB": Variant(AUTO, (BIG, "tiny"), length=2048, gb=24),
    "tell nf4, 12 GB": Variant(AUTO, (BIG, "tiny"), "nf4", length=2048, gb=12),
}
PARTS = {
    "tell, without graphs": Variant({}, (SMALL, "tiny"), off=("tell.train.trainer", "graphs_for"), graphs=False),
    "tell, by free memory": Variant(AUTO),
    "tell nf4": Variant({}, (BIG,), "nf4"),
    "tell int8": Variant({}, (BIG, "tiny"), "int8"),
    "tell fp16": Variant({}, (SMALL,), dtype=torch.float16),
    "tell, fast off": Variant({"fast": "off"}, (SMALL, "tiny"), graphs=False),
}
FEW, MANY = (3, 8), (16, 32)  # steps to warm up, and timed; many where graphs are captured on the way
SECONDS = {BIG: 45.0}  # after which a training ends, loading not included
LEAST_SECONDS = {BIG: 15.0, "tiny": 0.0}  # of a training: loading and the first steps


def plan_for(run: Run, size: str, *, graphs: bool) -> runners.Plan:
    """Steps of a training; ``graphs``: it may capture some, if the model is small."""
    warm, timed = (2, 2) if run.tiny else MANY if graphs and size != BIG else FEW
    return runners.Plan(run.batch, warm, timed, SECONDS.get(size, 25.0))


def least_seconds(size: str) -> float:
    return LEAST_SECONDS.get(size, 6.0)


def small_first(sizes: Iterable[str]) -> list[str]:
    """The big model takes longest, and has the most to measure."""
    return sorted(sizes, key=lambda size: size == BIG)


def train(run: Run) -> dict[str, Any]:
    """Real tokens a second of TELL's Trainer, and its memory: what there are goals for."""
    return _trained(run, "train", JUDGED)


def parts(run: Run) -> dict[str, Any]:
    """The same with parts of it on and off; then peaks of memory against those predicted."""
    out = _trained(run, "parts", PARTS)
    memory(run)
    return out


def _trained(run: Run, stage: str, variants: Mapping[str, Variant]) -> dict[str, Any]:
    out = run.stages.setdefault(stage, {})
    held: dict[str, Any] = {}  # the last model: it is as before after a training
    for size in small_first(run.sizes):
        for name, variant in variants.items():
            key = f"{size}: {name}"
            if size not in variant.sizes or key in out or run.late(key, least_seconds(size)):
                continue
            model_key = f"{size} {variant.base} {variant.dtype}"
            if model_key not in held:
                held.clear()
                run.clear()
            try:
                if variant.base != "full" and find_spec("bitsandbytes") is None:
                    run.find(key, "left out: bitsandbytes is not installed")
                    continue
                if model_key not in held:
                    held[model_key] = quantised(make_model(size, run.device, variant.dtype), variant.base)
                out[key] = _measured(run, held[model_key], size, variant)
                run.find(key, out[key])
            except Exception as error:
                held.clear()
                run.failed(out, key, error)
            run.save()
    return out


def _measured(run: Run, model: Any, size: str, variant: Variant) -> dict[str, Any]:
    plan = plan_for(run, size, graphs=variant.graphs)
    if variant.length is None:
        rows = rows_for(size, plan.rows, run.scale)
    else:
        plan = replace(plan, batch=4)
        rows = equal_rows(size, plan.rows, 64 if run.tiny else variant.length)
    layers = len(model.model.layers)
    settings = {"micro_tokens": run.micro, **variant.settings}
    if settings.get("recompute") == "all":
        settings["recompute"] = layers
    run.clear()
    with held_back(run, variant.gb) as taken, runners.without(*variant.off) if variant.off else nullcontext():
        timed = runners.tell(run, model, rows, plan, settings)
        peak = run.peak_gb()
    facts = timed.facts(rows, plan)
    tflops = facts["tokens_s"] * flops_a_token(model, train_rows(rows)) / 1e12
    ceiling = run.stages.get("facts", {}).get("matmul_tflops")
    return {
        **facts, "tflops": round(tflops, 2), "of_ceiling": round(tflops / ceiling, 4) if ceiling else None,
        "peak_gb": None if peak is None else round(peak - taken, 2), "exchanged": timed.exchanged, "notes": timed.notes,
    }  # fmt: skip


@contextmanager
def held_back(run: Run, gb: float | None) -> Iterator[float]:
    """Leave ``gb`` of the card, what is in use included, to what runs inside; GB that are taken away."""
    if gb is None or run.device != "cuda":
        yield 0.0
        return
    free, _ = torch.cuda.mem_get_info()
    taken = int(free - max(0.0, gb * 1e9 - torch.cuda.memory_allocated()))
    filler = torch.empty(max(0, taken), dtype=torch.uint8, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    yield filler.nbytes / 1e9


def memory(run: Run) -> dict[str, Any]:
    """Predicted peaks of training, as `tell plan` has them, and against those that `train` measured."""
    from tell.models.architecture import read_architecture

    out = run.stages.setdefault("memory", {})
    for size in run.sizes:
        config = make_model(size, "meta", torch.bfloat16).config.to_dict()
        arch, rows = read_architecture(Path("random-weights"), config), rows_for(size, 500, run.scale)
        for name, variant in (JUDGED | PARTS).items():
            told = variant.length is None and variant.dtype == torch.bfloat16
            if not told or variant.off or variant.settings.get("fast") == "off":
                continue
            key = size if name == "tell" else f"{size}: {name}"
            stage = run.stages.get("train" if name in JUDGED else "parts", {})
            peak = stage.get(f"{size}: {name}", {}).get("peak_gb")
            if key in out and out[key]["measured_gb"] == peak:
                continue  # told before
            predicted = _predicted(run, arch, rows, variant)
            off = None if not peak else round(abs(predicted / peak - 1), 3)
            out[key] = {"predicted_gb": round(predicted, 2), "measured_gb": peak, "off_by": off}
            run.find(f"peak memory {key}", out[key], good=off is None or off <= 0.15)
    return out


def _predicted(run: Run, arch: Any, rows: Rows, variant: Variant) -> float:
    """GB that torch allocates at most while a model trains on a GPU."""
    from tell.config_sections import TrainConfig
    from tell.models import predict
    from tell.models.machine import Place

    place, share = Place("cuda", "bf16"), float(rows.trained.sum() / rows.lengths.sum())
    settings = {"micro_tokens": run.micro, **variant.settings}
    if settings.get("recompute") == "all":
        settings["recompute"] = arch.layers
    steps = np.add.reduceat(rows.lengths, np.arange(0, len(rows), run.batch))
    load = predict.Load(int(rows.lengths.max()), int(steps.max()), share)
    free = torch.cuda.mem_get_info()[0] if run.device == "cuda" else None
    memory = predict.predict_memory(arch, TrainConfig(**settings), load, place=place, free=free, base=variant.base)
    return (memory.weights + memory.adapter + memory.activations) / 1e9


def flops_a_token(model: Any, rows: list[TrainRow]) -> float:
    """4 for each linear parameter, and of the output layer where a token is trained: LoRA without recomputation."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings().weight.numel()
    linear = sum(m.in_features * m.out_features for m in layers) - head  # quantised weights are packed
    share = sum(int(r.mask.sum()) for r in rows) / sum(len(r.ids) for r in rows)
    return 4.0 * linear + 4.0 * head * share
