"""Training by ms-swift's own entry, ``SwiftSft``; its dataset is replaced by the very tokens of the other engines.

It computes logits only at trained positions where it can (``use_logits_to_keep``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import transformers.trainer
from swift.arguments import SftArguments
from swift.pipelines.train.sft import SwiftSft

from bench.engines.gate import Gate
from bench.engines.serve import Build, serve_builds, versions
from bench.worker import Channel


class _Sft(SwiftSft):
    """Swift's pipeline fed with rows that are encoded already."""

    rows: list[dict[str, Any]]

    def _prepare_dataset(self) -> list[Any]:
        return [_Encoded(self.rows), None]


class _Encoded(list):
    """Rows as swift's collator takes them."""


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Serve builds, see `serve_builds`."""
    default = list(transformers.trainer.DEFAULT_CALLBACKS)

    def make(build: Build) -> Callable[[], Any]:
        transformers.trainer.DEFAULT_CALLBACKS[:] = [*default, Gate(build.meter)]
        pipeline = _Sft(_arguments(spec, build))
        pipeline.rows = []
        for row in build.examples():
            length = len(row["input_ids"])
            pipeline.rows.append({**row, "length": length, "lengths": [length]})
        return pipeline.main

    serve_builds(channel, spec, make, versions("ms-swift"))


def _arguments(spec: dict[str, Any], build: Build) -> SftArguments:
    setting = build.setting
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
        max_steps=build.steps,
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
        output_dir=build.folder,
        add_version=False,
        seed=spec["seed"],
        load_from_cache_file=False,
        lazy_tokenize=True,
    )
