"""Training by plain ``transformers.Trainer`` with peft."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from bench.engines.gate import Gate, arguments, examples, load, versions
from bench.rows import Rows
from bench.worker import Channel, Meter, Stopped


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Serve builds: ``{"do": "build", "setting": {...}, "order": [...]}``, each trained until the driver stops it."""
    rows = Rows.load(spec["rows"])
    while (message := channel.receive())["do"] == "build":
        setting, order = message["setting"], message["order"]
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=load(spec, setting),
                args=TrainingArguments(**arguments(spec, setting, -(-len(order) // spec["batch"]), folder)),
                train_dataset=examples(rows, order),  # type: ignore[arg-type]
                data_collator=DataCollatorWithFlattening() if setting["padding_free"] else pad,
                callbacks=[Gate(Meter(channel))],
            )
            channel.send(built=True, versions=versions())
            try:
                trainer.train()
            except Stopped:
                continue


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
