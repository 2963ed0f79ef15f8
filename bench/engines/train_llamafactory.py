"""Training by LLaMA-Factory's own entry, ``run_exp``, from its pre-tokenised format: the very tokens of the others.

``bf16`` there means weights in bf16 and autocast; its ``pure_bf16`` is refused without a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

if importlib.util.find_spec("torchaudio") is None:
    # It is imported for speech, at the head of a module; its wheel loads beside a torch built for CUDA only. Text
    # never calls it, so an empty module does.
    sys.modules["torchaudio"] = importlib.util.module_from_spec(ModuleSpec("torchaudio", None))

from llamafactory.train.tuner import run_exp

from bench.engines.gate import Gate, arguments
from bench.engines.serve import Build, serve_builds, versions
from bench.worker import Channel


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Serve builds, see `serve_builds`."""

    def make(build: Build) -> Callable[[], Any]:
        data = str(Path(build.folder) / "data")
        columns = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in build.examples()]
        DatasetDict({"train": Dataset.from_list(columns)}).save_to_disk(data)
        common = arguments(spec, build)
        for name in ("train_sampling_strategy", "gradient_checkpointing", "report_to"):
            common.pop(name)
        own = {
            "stage": "sft",
            "do_train": True,
            "report_to": "none",
            "bf16": spec["dtype"] == "bfloat16",
            "model_name_or_path": spec["model"],
            "flash_attn": {"sdpa": "sdpa", "eager": "disabled"}[build.setting["attention"]],
            "disable_gradient_checkpointing": True,
            "finetuning_type": "lora",
            "lora_rank": spec["rank"],
            "lora_alpha": spec["alpha"],
            "lora_dropout": 0.0,
            "lora_target": "all",
            "tokenized_path": data,
            "template": "empty",
            "disable_shuffling": True,
            "dataset": "unused",  # asked for, not read
        }
        return partial(run_exp, {**common, **own}, callbacks=[Gate(build.meter)])

    serve_builds(channel, spec, make, versions("llamafactory"))
