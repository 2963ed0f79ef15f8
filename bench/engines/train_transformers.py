"""Training by plain ``transformers.Trainer`` with peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from bench.engines.gate import Gate, arguments, load
from bench.engines.serve import Build, serve_builds, versions
from bench.worker import Channel


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Serve builds, see `serve_builds`."""

    def make(build: Build) -> Callable[[], Any]:
        return Trainer(
            model=load(spec, build.setting),
            args=TrainingArguments(**arguments(spec, build)),
            train_dataset=build.examples(),  # type: ignore[arg-type]
            data_collator=DataCollatorWithFlattening() if build.setting["padding_free"] else pad,
            callbacks=[Gate(build.meter)],
        ).train

    serve_builds(channel, spec, make, versions())


def pad(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Right-padded (rows, longest) batch of a micro-batch."""
    longest = max(len(f["input_ids"]) for f in features)

    def filled(lists: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([x + [value] * (longest - len(x)) for x in lists])

    return {
        "input_ids": filled([f["input_ids"] for f in features], 0),
        "labels": filled([f["labels"] for f in features], -100),
        "attention_mask": filled([[1] * len(f["input_ids"]) for f in features], 0),
    }
