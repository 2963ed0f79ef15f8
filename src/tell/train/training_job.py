"""A training job: what it is, its rows step by step, its learning rate, and what a checkpoint may resume."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tell.config_sections import TrainConfig
from tell.mix.mixture import ANCHORED, Mixture
from tell.rows.row_table import RowTable
from tell.train.packing import TrainRow
from tell.train.soft_targets import SoftTargets
from tell.train.step_log import StepReport


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Totals of a run; ``tokens`` are real tokens, without padding."""

    steps: int
    tokens: int
    trained_tokens: int
    seconds: float
    learning_rate: float

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "seconds": round(self.seconds, 3)}


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One adapter to train. Picklable: other processes of a run receive it as it is.

    Attributes:
        tables: tokenised rows by source name.
        mixture: the rows to train on, in order.
        seed: of LoRA's initial weights, dropout and noise.
        folder: receives the adapter and its checkpoints.
        log: JSON Lines file of the steps; a tracker's files go to the folder of the same name.
        targets: of the general rows, where ``train.general_target`` is not their text.
    """

    tables: Mapping[str, RowTable]
    mixture: Mixture
    settings: TrainConfig
    seed: int
    folder: Path
    log: Path
    targets: SoftTargets | None = None


@dataclass(frozen=True, slots=True)
class TrainingHooks:
    """Callbacks of a training loop.

    Attributes:
        stopped: polled between steps; True writes a checkpoint and raises Interrupted.
        progress: called after each step.
        marks: folders that receive a copy of the adapter, by the number of steps after which it is made.
        note: receives sentences on trackers that were turned off.
        moved: called within a step, after each forward and backward pass, with the tokens this process trained on.
    """

    stopped: Callable[[], bool] | None = None
    progress: Callable[[StepReport], None] | None = None
    moved: Callable[[int], None] | None = None
    marks: Mapping[int, Path] = field(default_factory=dict)
    note: Callable[[str], None] = lambda text: None


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Learning rate at a step counted from 0. Warm-up ends before the last step, so that a run of one step learns.

    ``config.learning_rate`` must be resolved; Trainer does that by the size of the model.
    """
    if config.learning_rate is None:
        raise ValueError("learning_rate is not resolved")
    warmup = min(math.ceil(config.warmup_ratio * steps), steps - 1)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - share)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    return config.learning_rate


def run_digest(config: TrainConfig, mixture: Mixture, seed: int) -> str:
    """Identifies what a checkpoint may resume: settings, seed, order and tokens.

    The mixture's own digest identifies examples; the tokens distinguish anchors, templates and tokenizers.
    """
    settings = config.model_dump(exclude={"checkpoint_every", "micro_tokens", "parallel", "report_to"})
    digest = hashlib.sha256(json.dumps([settings, mixture.digest(), seed], sort_keys=True).encode())
    for name in mixture.sources:
        table = mixture.tables[name]
        for column in (table.ids, table.mask, table.starts):
            digest.update(np.ascontiguousarray(column).data)
        if table.weights is not None:
            digest.update(np.ascontiguousarray(table.weights).data)
    return digest.hexdigest()[:32]


def step_rows(
    mixture: Mixture,
    tables: Mapping[str, RowTable],
    step: int,
    batch_size: int,
    targets: SoftTargets | None = None,
) -> list[TrainRow]:
    """The rows of one step, in the mixture's order; general ones with their ``targets``."""
    rows = []
    for at in range(step * batch_size, min((step + 1) * batch_size, len(mixture))):
        source = int(mixture.source[at])
        name = mixture.sources[source]
        table, row = tables[name], int(mixture.row[at])
        soft = None if targets is None or name in ANCHORED else targets.row(row)
        rows.append(TrainRow(*table.row(row), source, name in ANCHORED, soft, table.weight(row)))
    return rows
