"""Training and decoding speed of this machine: measured for --max-minutes, saved for later plans."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from tell.errors import TellError
from tell.models.machine import Place
from tell.models.predict import record_speed
from tell.rows.row_table import RowTable
from tell.rows.tokenize import prompt_ids
from tell.run.costs import speed_name
from tell.run.session import Session, dtype_name
from tell.run.task import Task

if TYPE_CHECKING:
    from tell.decode.protocol import DecodingEngine
    from tell.models.load import Loaded

PROMPTS, NEW_TOKENS = 32, 8  # decoded to measure the speed: some seconds on two slow cores
WARM_UP_ROWS = 2


def measure_pace(task: Task, table: RowTable, session: Session) -> None:
    """Measure a training step and a few decoded tokens, so that --max-minutes reflects this machine as it is now.

    Args:
        table: the task's rows.
    """
    import torch

    from tell.train.device import trains_fast
    from tell.train.lora import add_lora, remove_lora
    from tell.train.packing import TrainRow
    from tell.train.plain import PlainBody, plain_step_loss
    from tell.train.step import Body, StepRules, step_loss

    config, loaded = task.config, session.loaded
    decode = _decoding_speed(task, session.engine)
    fast = trains_fast(config.train.fast, loaded.device)
    tuned = add_lora(loaded.model, config.train, seed=config.seed, fused=fast)
    plain = None if fast else PlainBody(tuned)
    try:
        step = partial(step_loss, Body(tuned)) if plain is None else partial(plain_step_loss, plain)
        rules = StepRules(config.train.loss_normalization, micro_tokens=config.train.forward_tokens)
        rows = [TrainRow(*table.row(i % len(table)), 0, True) for i in range(config.train.batch_size)]
        for part in (rows[:WARM_UP_ROWS], rows):
            begin = time.monotonic()
            out = step(part, rules)
            if loaded.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds = time.monotonic() - begin
    finally:
        remove_lora(tuned)
        if plain is not None:
            plain.give_back()
    keep_speed(task, loaded, out.tokens / seconds, decode)


def _decoding_speed(task: Task, engine: DecodingEngine) -> float | None:
    """Tokens a second while several test prompts are answered, their prefill left out; None without test rows."""
    from tell.decode.sampler import Decoding

    prompts = [prompt_ids(task.chat, example) for example in task.test[:PROMPTS]]
    if not prompts:
        return None
    seen: list[tuple[float, int]] = []
    rule = Decoding(max_new_tokens=NEW_TOKENS, stop_ids=(), greedy=True, batch_size=len(prompts))
    engine.generate(prompts, rule, progress=lambda new, _: seen.append((time.monotonic(), new)))
    if len(seen) < 2:
        return None
    prefilled = next((i for i, (_, new) in enumerate(seen) if new == len(prompts)), 0)
    seconds = seen[-1][0] - seen[prefilled][0]
    tokens = sum(new for _, new in seen[prefilled + 1 :])
    return tokens / seconds if tokens and seconds > 0 else None


def keep_speed(task: Task, loaded: Loaded, tokens_per_second: float, decoded_per_second: float | None = None) -> None:
    """Remember how fast a model trained and decoded here."""
    with suppress(TellError):  # an unwritable home makes the next plan less accurate but does not fail this run
        record_speed(
            speed_name(task),
            Place(loaded.device.type, dtype_name(loaded)),
            tokens_per_second,
            answer_tokens_per_second=decoded_per_second,
        )
