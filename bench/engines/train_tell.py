"""Training by tell's own Trainer, from row table to optimiser step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.serve import Build, serve_builds, versions
from bench.rows import Rows
from bench.worker import Channel, reset_peak
from tell import __version__
from tell.config_sections import TrainConfig
from tell.mix.mixture import Mixture
from tell.models.find import find_model
from tell.models.load import load_model
from tell.rows.row_table import RowTable
from tell.train.trainer import StepReport, Trainer
from tell.train.training_job import TrainingHooks, TrainingJob


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Serve builds, see `serve_builds`; the setting is what `TrainConfig` takes."""
    loaded = load_model(find_model(spec["model"]), device=spec["device"], dtype=spec["dtype_name"])

    def make(build: Build) -> Callable[[], Any]:
        config = TrainConfig(
            batch_size=spec["batch"],
            lora_r=spec["rank"],
            lora_alpha=spec["alpha"],
            lora_dropout=0,
            learning_rate=spec["learning_rate"],
            schedule="constant",
            checkpoint_every=0,
            **build.setting,
        )
        mixture = _mixture(build.rows, np.array(build.order))
        meter = build.meter
        meter.model = loaded.model

        def progress(report: StepReport) -> None:
            meter.tokens += report.tokens
            meter.step()

        folder = Path(build.folder)
        job = TrainingJob(mixture.tables, mixture, config, spec["seed"], folder, folder / "log.jsonl")
        trainer = Trainer(loaded.model, job, device=loaded.device, hooks=TrainingHooks(progress=progress))

        def train() -> None:
            reset_peak()
            meter.wait()
            trainer.run()

        return train

    serve_builds(channel, spec, make, {"tell": __version__, **versions()})


def _mixture(rows: Rows, order: np.ndarray) -> Mixture:
    """A mixture in exactly the given order of rows."""
    names = ("task", "general")
    kinds = [np.flatnonzero(rows.task), np.flatnonzero(~rows.task)]
    place = np.zeros(len(rows), dtype=np.int32)
    for kind in kinds:
        place[kind] = np.arange(len(kind))
    tables = {name: _table(name, rows, kind) for name, kind in zip(names, kinds, strict=True)}
    return Mixture(
        sources=names,
        source=(~rows.task[order]).astype(np.int8),
        row=place[order],
        repetition=np.zeros(len(order), dtype=np.int32),
        tables=tables,
        ordering="shuffle",
        repeat=1,
        seed=0,
    )


def _table(name: str, rows: Rows, kind: np.ndarray) -> RowTable:
    pieces = [rows.row(int(i)) for i in kind]
    tokens = np.array([len(ids) for ids, _ in pieces], dtype=np.int32)
    masks = [np.arange(len(ids)) >= prompt for ids, prompt in pieces]
    return RowTable(
        source=name,
        hashes=np.array([f"{name}{i}" for i in kind], dtype=str),
        origins=np.array([f"bench:{i}" for i in kind], dtype=str),
        tokens=tokens,
        trained=np.array([int(mask.sum()) for mask in masks], dtype=np.int32),
        unit=tokens,
        ids=np.concatenate([ids for ids, _ in pieces] or [np.empty(0)]).astype(np.int32),
        mask=np.concatenate(masks or [np.empty(0)]).astype(bool),
        starts=np.concatenate([[0], np.cumsum(tokens)]).astype(np.int64),
    )
