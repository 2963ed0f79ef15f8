"""Training by ``trl.SFTTrainer``; its ``nll`` loss is computed in chunks, never holding the full logits."""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bench.engines.gate import Gate, arguments, examples, load, versions
from bench.rows import Rows
from bench.worker import Channel, Meter, Stopped


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Serve builds: ``{"do": "build", "setting": {...}, "order": [...]}``, each trained until the driver stops it."""
    rows = Rows.load(spec["rows"])
    while (message := channel.receive())["do"] == "build":
        setting, order = message["setting"], message["order"]
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                **arguments(spec, setting, -(-len(order) // spec["batch"]), folder),
                max_length=None,
                padding_free=setting["padding_free"],
                dataset_kwargs={"skip_prepare_dataset": True},
            )
            trainer = SFTTrainer(
                model=load(spec, setting),
                args=config,
                train_dataset=Dataset.from_list(examples(rows, order)),
                processing_class=AutoTokenizer.from_pretrained(spec["model"], local_files_only=True),
                callbacks=[Gate(Meter(channel))],
            )
            channel.send(built=True, versions=versions("trl"))
            try:
                trainer.train()
            except Stopped:
                continue
