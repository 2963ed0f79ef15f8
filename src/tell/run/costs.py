"""Predicted time, memory and FLOPs of a run, from sizes and from speeds measured on this machine. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tell.config import Config
from tell.config_sections import TrainConfig
from tell.mix.mixture import GENERAL, Mixture
from tell.mix.prefixes import shared_prefixes, task_and_other
from tell.models import machine
from tell.models.base import FULL
from tell.models.flops import inference_flops, lora_parameters, training_flops
from tell.models.predict import answer_speed, predict_seconds
from tell.names import ARMS
from tell.rows.prefix import computed_tokens
from tell.run.answers import answer_limit
from tell.run.forgetting import ANSWER_TOKENS, SETS
from tell.run.known_ranking import needs_ranking
from tell.run.prepare import Prepared
from tell.run.task import Task

SELF_KEPT = 0.7  # share of the model's own rows that pass the filters (91 of 128, SmolLM2-135M)
ANSWER_SECONDS_SHARE = 3.0  # decoding a token costs about this many times training on one (docs/explanation/lab.md)
GENERAL_ROW_TOKENS = 150  # tokens of a row that general loss is measured on; an estimate
TEMPLATE_TOKENS = 20  # of a prompt besides its text; an estimate
OTHER_SECONDS = 2.0  # of an arm: its adapter merged, its answers scored; and once for the report


def computed_by(task: Task, mixture: Mixture) -> int:
    """Tokens that training computes: those of the rows, but a shared prefix once a pass (an estimate)."""
    config = task.config.train
    if not len(mixture) or not shares_prefix(config):
        return int(mixture.column("tokens").sum(dtype=np.int64))
    prefix, shared = shared_prefixes(mixture)
    return computed_tokens(
        *task_and_other(mixture, config.batch_size),
        prefix=prefix,
        shared=shared,
        micro_tokens=config.forward_tokens,
        per_row=likely_place(task.config).device == "cuda",
    )


def shares_prefix(train: TrainConfig) -> bool:
    """Whether passes compute the common prefix of rows once: where nothing random differs between them."""
    return not train.lora_dropout and not train.neftune_alpha


def likely_place(config: Config) -> machine.Place:
    """Device and number format of the run, as far as they are known without torch."""
    return machine.likely_place(config.model.device, config.model.dtype)


def speed_name(task: Task) -> str:
    """The name of the task's model among measured speeds; quantised, it is another one."""
    return " ".join([task.files.fingerprint, *([] if (base := task.config.model.base) == FULL else [base])])


def arm_costs(task: Task, mixture: Mixture) -> dict:
    """Steps, tokens, FLOPs and predicted seconds of one trained arm.

    ``target_seconds``, a part of ``seconds``, are those of the untuned model over the general rows that are distilled.
    """
    config, arch = task.config, task.files.architecture
    lengths = mixture.column("tokens")
    trained = int(mixture.column("trained").sum(dtype=np.int64))
    adapter = lora_parameters(arch, config.train.lora_r, config.train.lora_targets)
    tokens = int(lengths.sum(dtype=np.int64))
    facts = {"trained_tokens": trained, "lengths": lengths.tolist(), "lora_parameters": adapter}
    computed = max(1, computed_by(task, mixture))
    time = predict_seconds(arch, computed, fingerprint=speed_name(task), place=likely_place(config), **facts)
    costs: dict[str, Any] = {
        "steps": mixture.steps(config.train.batch_size),
        "rows": len(mixture),
        "tokens": tokens,
        "computed_tokens": computed,
        "trained_tokens": trained,
        "flops": training_flops(arch, tokens, **facts),
        "seconds": time.seconds,
        "basis": time.basis,
    }
    if task.general_target == "untuned" and GENERAL in mixture.sources:
        table = mixture.tables[GENERAL]
        rows = np.unique(mixture.row[mixture.source == mixture.sources.index(GENERAL)])
        once, heads = table.tokens[rows], int(table.trained[rows].sum(dtype=np.int64))
        forward = int(once.sum(dtype=np.int64))
        costs["target_seconds"] = time.seconds * forward / (3 * computed)
        costs["seconds"] += costs["target_seconds"]
        costs["flops"] += inference_flops(arch, forward, output_tokens=heads, lengths=once.tolist())
    return costs


@dataclass(frozen=True)
class Pace:
    """Tokens a second: ``train`` computed in training, ``decode`` decoded."""

    train: float
    decode: float

    @classmethod
    def of(cls, task: Task, costs: dict) -> Pace:
        """Speeds from the predicted time of an arm's training and the decoding speed measured here, if any."""
        seconds = costs["seconds"] - costs.get("target_seconds", 0.0)
        train = costs["computed_tokens"] / seconds if seconds else 1.0
        measured = answer_speed(speed_name(task), likely_place(task.config))
        return cls(train, measured or train / ANSWER_SECONDS_SHARE)


def answer_seconds(task: Task, arm: str, pace: Pace) -> float:
    """Predicted seconds to answer the test rows once; the untuned model is taken to use the whole limit."""
    if not task.test:
        return 0.0
    tuned = ARMS[arm].adapter is not None
    sample = task.test[:50]
    length = np.mean([task.chat.length(e.answer) for e in sample])
    answers = length if tuned else answer_limit(task.config, task.chat, task.train)
    prompts = np.mean([task.chat.length(e.question) for e in sample])
    shots = sum(task.chat.length(m.content) for e in task.shots for m in e.messages)
    return float(len(task.test) * (answers / pace.decode + (prompts + shots) / (3 * pace.train)))


def readout_seconds(prepared: Prepared, pace: Pace) -> float:
    """Predicted seconds to compute the hidden states of training and test prompts and of the values' names."""
    task = prepared.task
    if not task.decides or not any(ARMS[arm].decides for arm in prepared.arms):
        return 0.0
    sample = (task.train + task.test)[:50]
    prompt = np.mean([task.chat.length(e.question) for e in sample])
    rows = len(task.train) + len(task.test) + sum(len(field.values) for field in task.closed)
    return float(rows * (prompt + TEMPLATE_TOKENS) / (3 * pace.train))


def measuring_seconds(task: Task, arms: Sequence[str], pace: Pace) -> float:
    """Predicted seconds to measure forgetting, of the untuned model and each trained arm."""
    rules = task.config.eval
    if not rules.forgetting_rows:
        return 0.0
    loss = SETS * rules.forgetting_rows * GENERAL_ROW_TOKENS / (3 * pace.train)
    return (len(arms) + 1) * (loss + rules.forgetting_answers * ANSWER_TOKENS / pace.decode)


def writing_seconds(prepared: Prepared, pace: Pace) -> float:
    """Predicted seconds until the model has written the general rows that are so far only estimated."""
    general, draw = prepared.general, prepared.draw
    if general is None or draw is None or not general.estimated:
        return 0.0
    return float(general.table.trained[draw.indices].sum(dtype=np.int64)) / SELF_KEPT / pace.decode


def ranking_seconds(prepared: Prepared, pace: Pace) -> float:
    """Predicted seconds to rank the general rows by hidden states of their prompts, where that is yet to be done."""
    general = prepared.general
    if general is None or general.ranking is not None or not needs_ranking(prepared.task, prepared.table, general):
        return 0.0
    prompts = np.asarray(general.table.tokens) - np.asarray(general.table.trained)
    return float(prompts[general.allowed].sum(dtype=np.int64)) / (3 * pace.train)


def pseudo_seconds(prepared: Prepared, pace: Pace) -> float:
    """Predicted seconds to answer unlabelled prompts, and to write them where there is no file of them."""
    seconds, written = 0.0, 0.0
    for pseudo in prepared.pseudo.values():
        if pseudo.estimated:
            table = pseudo.table
            answers, prompts = float(table.trained.sum()), float(table.tokens.sum() - table.trained.sum())
            seconds += answers / pace.decode + prompts / (3 * pace.train)
            if pseudo.prompts is None:
                written = max(written, prompts / SELF_KEPT / pace.decode)
    return seconds + written
