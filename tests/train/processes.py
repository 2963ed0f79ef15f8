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
from torch.distributed.tensor import DTensor

from tell.config_sections import TrainConfig
from tell.errors import Interrupted
from tell.mix.amount import general_rows
from tell.mix.mixture import build
from tell.train.launch import launched
from tell.train.parallel import Processes
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


def train(model: Path, folder: Path, config: TrainConfig, *, broken=False, resume=False, stopped=None, processes=None):
    """(gradients of each step, result, base model afterwards) of a run in ``folder``."""
    tables, mixture = mixture_of(broken=broken)
    log = folder / "logs" / "tell.jsonl"
    base = load(model, dtype=torch.bfloat16 if "bf16" in folder.name else torch.float32)
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
        here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in base.parameters())
        leave(case, (gradients, result.tokens, result.trained_tokens, here))

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
