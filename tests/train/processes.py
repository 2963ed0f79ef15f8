"""One of two processes that train a tiny model: ``processes.py MODEL OUT``, started as torchrun would start it.

Each case leaves ``OUT/<case>/`` with what a run leaves, and what each process saw in ``OUT/<case>.<rank>.pt``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tell.config_sections import TrainConfig
from tell.errors import Interrupted
from tell.mix.amount import general_rows
from tell.mix.mixture import build
from tell.models.find import find_model
from tell.models.load import empty_model
from tell.train.launch import launched
from tell.train.lora import add_lora
from tell.train.parallel import Processes, shard
from tell.train.soft_targets import untuned_targets
from tell.train.trainer import Trainer
from tell.train.training_job import TrainingHooks, TrainingJob
from train.packed import load, make_rows, make_table

CONFIG = TrainConfig(
    batch_size=4, learning_rate=5e-3, lora_r=4, lora_dropout=0.0, checkpoint_every=0, micro_tokens=90, task_weight=2.0
)
OBJECTIVE = {"general_target": "untuned", "average": 0.5, "adapter_scale": 0.5}
CASES = {
    "ddp": CONFIG,
    "plain": CONFIG.model_copy(update={"fast": "off", "loss_normalization": "token"}),
    "fsdp": CONFIG.model_copy(update={"parallel": "fsdp"}),
    "objective": CONFIG.model_copy(update=OBJECTIVE),
    "fsdp-objective": CONFIG.model_copy(update={**OBJECTIVE, "parallel": "fsdp"}),
    "fsdp-bf16": CONFIG.model_copy(update={"parallel": "fsdp"}),  # adapters stay in fp32
}


def mixture_of(*, broken: bool = False):
    """(tables, mixture) of 17 rows: the last of five steps has one row, and so nothing for the second process."""
    tables = {
        "task": make_table(make_rows([30 + i for i in range(3)], prefix=12, seed=1), "task"),
        "general": make_table(make_rows([20 + 3 * i for i in range(11)], seed=2), "general"),
    }
    if broken:
        tables["general"].ids[:] = 10**6
    draw = general_rows(tables["general"].unit, task_tokens=0, rows=11, seed=0)
    return tables, build(tables, general=draw, repeat=2, ordering="shuffle", seed=0)


@contextmanager
def recorded() -> Iterator[list[dict[str, torch.Tensor]]]:
    """The gradients of every step, before they are clipped."""
    seen: list[dict[str, torch.Tensor]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def watch(parameters: Any, *rest: Any) -> torch.Tensor:
        parameters = list(parameters)
        seen.append({str(i): p.grad.clone() for i, p in enumerate(parameters)})
        return clip(parameters, *rest)

    torch.nn.utils.clip_grad_norm_ = watch
    try:
        yield seen
    finally:
        torch.nn.utils.clip_grad_norm_ = clip


def local(p: torch.Tensor) -> torch.Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


@contextmanager
def watched(model: Any) -> Iterator[list[int]]:
    """The base model's numbers that this process holds, at each tensor that the first process sends."""
    held: list[int] = []
    send = dist.broadcast

    def watch(tensor: torch.Tensor, *rest: Any, **more: Any) -> Any:
        base = (p for name, p in model.named_parameters() if "lora_" not in name and not p.is_meta)
        here = sum(local(p).numel() for p in base)
        held.append(here + tensor.numel())
        return send(tensor, *rest, **more)

    dist.broadcast = watch
    try:
        yield held
    finally:
        dist.broadcast = send


def sharded(model: Path, processes: Processes) -> tuple[list[str], list[int], list[str]]:
    """What differs from the whole model after sharding, what was held meanwhile, and what the files lie elsewhere."""
    whole, files = load(model), find_model(str(model))
    base = whole if processes.leads else empty_model(files, torch.float32)
    maps = Path("/proc/self/maps")
    copied = [name for name, p in base.named_parameters() if not p.is_meta and not mapped(p, maps)]
    tuned = add_lora(base, CONFIG, seed=7, fused=False)
    base = tuned.get_base_model()
    with watched(base) as held:
        shard(tuned, torch.device("cpu"), processes)
    expected = dict(load(model).named_parameters()) | dict(whole.named_buffers())
    odd = []
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        name = name.replace(".base_layer", "")
        if "lora_" not in name and not torch.equal(full, expected.pop(name)):
            odd.append(name)
    return odd + [name for name in expected if "lora_" not in name], held, copied


def mapped(p: torch.Tensor, maps: Path) -> bool:
    """Whether a tensor is pages of a file; True where the system does not tell."""
    if not maps.exists():
        return True
    for line in maps.read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= p.data_ptr() < end:
            return line.endswith(".safetensors")
    return False


def train(model: Path, folder: Path, config: TrainConfig, *, broken=False, resume=False, stopped=None, processes=None):
    """(gradients of each step, result, base model afterwards) of a run in ``folder``."""
    tables, mixture = mixture_of(broken=broken)
    log = folder / "logs" / "tell.jsonl"
    dtype = torch.bfloat16 if "bf16" in folder.name else torch.float32
    empty = processes is not None and processes.sharded and not processes.leads
    base = empty_model(find_model(str(model)), dtype) if empty else load(model, dtype=dtype)
    targets = None
    if config.general_target == "untuned":
        targets = untuned_targets(load(model), tables["general"], range(len(tables["general"])))  # a whole model
    job = TrainingJob(tables, mixture, config, 7, folder / "adapter", log, targets)
    trainer = Trainer(base, job, hooks=TrainingHooks(stopped=stopped), processes=processes)
    with recorded() as gradients:
        return gradients, trainer.run(resume=resume), base


def main(model: Path, out: Path) -> None:
    launch = launched()
    assert launch is not None

    def joined(sharded: bool = False) -> Processes:
        return Processes(launch, "cpu", sharded=sharded)

    def leave(case: str, what: Any) -> None:
        torch.save(what, out / f"{case}.{launch.rank}.pt")

    for case, config in CASES.items():
        gradients, result, base = train(model, out / case, config, processes=joined("fsdp" in case))
        here = sum(local(p).numel() for p in base.parameters())
        leave(case, (gradients, result.tokens, result.trained_tokens, here))

    leave("shards", sharded(model, joined(sharded=True)))

    for case in ("ddp", "fsdp", "objective"):  # a signal reaches the second process alone, in the second step
        asked = iter([False, launch.rank == 1, False, False, False])
        try:
            train(model, out / f"{case}-stopped", CASES[case], processes=joined(case == "fsdp"), stopped=asked.__next__)
        except Interrupted as error:
            leave(f"{case}-stopped", str(error))
        train(model, out / f"{case}-stopped", CASES[case], processes=joined(case == "fsdp"), resume=True)

    for case, options in (
        ("broken", {"broken": launch.rank == 1}),
        ("diverged", {"config": CONFIG.model_copy(update={"learning_rate": 1e30})}),
    ):
        processes = joined()
        try:
            train(model, out / case, **{"config": CONFIG, **options}, processes=processes)
        except Exception as error:
            leave(case, (type(error).__name__, str(error), processes.busy))
        processes.broadcast("all are here again")

    processes = joined(sharded=True)
    try:  # the second process dies inside a pass, where the first waits for its weights
        train(model, out / "dead", CASES["fsdp"], processes=processes, broken=launch.rank == 1)
    except Exception as error:
        leave("dead", (type(error).__name__, str(error), processes.busy))
        if launch.rank == 1:
            os._exit(3)
    processes.dismiss(None)  # must not wait for the dead


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
