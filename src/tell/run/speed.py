"""Training and decoding speed of this machine: measured for --max-minutes, saved for later plans."""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tell.errors import Diverged, TellError
from tell.mix.mixture import build_repeated
from tell.models.machine import Place
from tell.models.predict import record_speed
from tell.rows.row_table import RowTable
from tell.rows.tokenize import prompt_ids
from tell.run.costs import computed_by, speed_name
from tell.run.session import Session, dtype_name
from tell.run.task import Task

if TYPE_CHECKING:
    from tell.decode.protocol import DecodingEngine
    from tell.models.load import Loaded
    from tell.train.step_log import StepReport

PROMPTS, NEW_TOKENS = 32, 8  # decoded to measure the speed: some seconds on two slow cores
WARM_UP_ROWS = 2
STEPS, WARM_UP_STEPS = 6, 3  # on a GPU: kernels compile in the first, graphs are captured in the second


def measure_pace(task: Task, table: RowTable, session: Session) -> None:
    """Measure training steps and a few decoded tokens, so that --max-minutes reflects this machine as it is now.

    Args:
        table: the task's rows.
    """
    from tell.train.lora import is_spread

    loaded = session.loaded
    if is_spread(loaded.model):  # it only answers; arms that would train are refused where they begin
        return
    decode = _decoding_speed(task, session.engine)
    measure = _trainer_speed if loaded.device.type == "cuda" else _step_speed
    if train := measure(task, table, session):
        keep_speed(task, loaded, train, decode)


def _trainer_speed(task: Task, table: RowTable, session: Session) -> float | None:
    """Tokens a second of the training loop, its passes fitted to memory and its CUDA graphs captured.

    None where the loss is no number, which the run itself will find out.
    """
    from tell.train.trainer import Trainer
    from tell.train.training_job import TrainingHooks, TrainingJob

    size, seed, ends = task.config.train.batch_size, task.config.seed, list[float]()
    rows = np.resize(np.arange(len(table), dtype=np.int32), size)  # the same in each step: so are the shapes
    mixture = replace(build_repeated(table, size * STEPS, seed), row=np.tile(rows, STEPS))
    alone = {"checkpoint_every": 0, "general_target": "text", "report_to": ()}
    settings = task.training(mixture).model_copy(update=alone)

    def progress(report: StepReport) -> None:
        ends.append(report.seconds)
        session.check()

    with tempfile.TemporaryDirectory() as name, suppress(Diverged):
        job = TrainingJob(mixture.tables, mixture, settings, seed, Path(name, "adapter"), Path(name, "log.jsonl"))
        hooks = TrainingHooks(progress=progress)
        Trainer(session.model, job, device=session.loaded.device, hooks=hooks).run()
    if len(ends) < STEPS or ends[-1] <= ends[WARM_UP_STEPS - 1]:
        return None
    timed = (STEPS - WARM_UP_STEPS) / STEPS * computed_by(task, mixture)
    return timed / (ends[-1] - ends[WARM_UP_STEPS - 1])


def _step_speed(task: Task, table: RowTable, session: Session) -> float:
    """Tokens a second of one step, without the update."""
    import torch

    from tell.train.device import trains_fast
    from tell.train.lora import add_lora, remove_lora
    from tell.train.packing import TrainRow
    from tell.train.plain import PlainBody, plain_step_loss
    from tell.train.step import Body, StepRules, step_loss

    config, loaded = task.config, session.loaded
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
    return out.tokens / seconds


def _decoding_speed(task: Task, engine: DecodingEngine) -> float | None:
    """Tokens a second while several test prompts are answered, their prefill left out; None without test rows."""
    from tell.decode.engine import Engine
    from tell.decode.sampler import Decoding

    prompts = [prompt_ids(task.chat, example) for example in task.test[:PROMPTS]]
    if not prompts:
        return None
    seen: list[tuple[float, int]] = []
    rule = Decoding(max_new_tokens=NEW_TOKENS, stop_ids=(), greedy=True, batch_size=len(prompts))
    gpu = engine.device.type == "cuda"
    with engine.fixed_weights() if gpu and isinstance(engine, Engine) else nullcontext():
        if gpu:  # compiles, and records the steps: most of the time of so few tokens
            engine.generate(prompts, rule)
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
