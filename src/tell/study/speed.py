"""How fast this machine trains a model: measured before a run that must end in time, kept for later plans."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import Any

from tell.errors import TellError
from tell.models.predict import record_speed
from tell.rows.table import RowTable
from tell.study.prepare import Task
from tell.study.record import dtype_name


def measure_speed(task: Task, table: RowTable, loaded: Any) -> None:
    """Measure two training steps, so that --max-minutes goes by this machine as it is now, and keep what they show.

    Args:
        table: the task's rows.
        loaded: the base model, a `tell.models.load.Loaded`.
    """
    import torch

    from tell.train.batches import TrainRow
    from tell.train.lora import add_lora, remove_lora
    from tell.train.plain import PlainBody, plain_step_loss
    from tell.train.step import Body, step_loss
    from tell.train.transfer import trains_fast

    config = task.config
    fast = trains_fast(config.train.fast, loaded.device)
    tuned = add_lora(loaded.model, task.training, seed=config.seed, fused=fast)
    plain = None if fast else PlainBody(tuned)
    try:
        step = partial(step_loss, Body(tuned)) if plain is None else partial(plain_step_loss, plain)
        rows = [TrainRow(*table.row(i % len(table)), 0, True) for i in range(config.train.batch_size)]
        for _ in range(2):  # the first warms up
            begin = time.monotonic()
            out = step(
                rows,
                normalization=config.train.loss_normalization,
                micro_tokens=config.train.micro_tokens,
                device=loaded.device,
            )
            if loaded.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds = time.monotonic() - begin
    finally:
        remove_lora(tuned)
        if plain is not None:
            plain.give_back()
    keep_speed(task, loaded, out.tokens / seconds)


def keep_speed(task: Task, loaded: Any, tokens_per_second: float) -> None:
    """Remember how fast a model trained here."""
    with suppress(TellError):  # a home that cannot be written costs the next plan's accuracy, not this run
        record_speed(task.files.fingerprint, loaded.device.type, dtype_name(loaded), tokens_per_second)
