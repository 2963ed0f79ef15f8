"""Training by ms-swift's own entry, ``SwiftSft``; its dataset is replaced by the very tokens of the other engines.

It computes logits only at trained positions where it can (``use_logits_to_keep``).
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import transformers.trainer
from swift.arguments import SftArguments
from swift.pipelines.train.sft import SwiftSft

from bench.engines.gate import Gate, examples, versions
from bench.rows import Rows
from bench.worker import Channel, Meter, Stopped


class _Sft(SwiftSft):
    """Swift's pipeline fed with rows that are encoded already."""

    rows: list[dict[str, Any]]

    def _prepare_dataset(self) -> list[Any]:
        return [_Encoded(self.rows), None]


class _Encoded(list):
    """Rows as swift's collator takes them."""


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Serve builds: ``{"do": "build", "setting": {...}, "order": [...]}``, each trained until the driver stops it."""
    rows = Rows.load(spec["rows"])
    default = list(transformers.trainer.DEFAULT_CALLBACKS)
    while (message := channel.receive())["do"] == "build":
        setting, order = message["setting"], message["order"]
        transformers.trainer.DEFAULT_CALLBACKS[:] = [*default, Gate(Meter(channel))]
        with tempfile.TemporaryDirectory() as folder:
            pipeline = _Sft(_arguments(spec, setting, -(-len(order) // spec["batch"]), folder))
            pipeline.rows = [
                {**row, "length": len(row["input_ids"]), "lengths": [len(row["input_ids"])]}
                for row in examples(rows, order)
            ]
            channel.send(built=True, versions=versions("ms-swift"))
            try:
                pipeline.main()
            except Stopped:
                continue


def _arguments(spec: dict[str, Any], setting: dict[str, Any], steps: int, folder: str) -> SftArguments:
    return SftArguments(
        model=spec["model"],
        model_type=os.environ.get("SWIFT_MODEL_TYPE", "llama"),
        template="dummy",
        dataset=["unused"],
        torch_dtype=spec["dtype"],
        bf16=setting["autocast"] and spec["dtype"] == "bfloat16",
        fp16=False,
        attn_impl=setting["attention"],
        tuner_type="lora",
        lora_rank=spec["rank"],
        lora_alpha=spec["alpha"],
        lora_dropout=0.0,
        target_modules=["all-linear"],
        per_device_train_batch_size=setting["micro"],
        gradient_accumulation_steps=spec["batch"] // setting["micro"],
        max_steps=steps,
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        use_cpu=spec["device"] == "cpu",
        gradient_checkpointing=False,
        dataset_shuffle=False,
        train_dataloader_shuffle=False,
        split_dataset_ratio=0.0,
        dataloader_num_workers=0,
        logging_steps=1000,
        save_strategy="no",
        report_to=["none"],
        output_dir=folder,
        add_version=False,
        seed=spec["seed"],
        load_from_cache_file=False,
        lazy_tokenize=True,
    )
