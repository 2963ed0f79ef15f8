"""What engines on transformers' Trainer share: a callback that stops them after each turn, model and arguments."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from bench.engines.serve import Build, Setting
from bench.worker import Meter, reset_peak


class Gate(TrainerCallback):
    """Holds a Trainer between turns and counts the real tokens that its model is fed.

    A Trainer fetches the batches of a step before it begins, so a turn pays for the fetching of the next one.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.meter.model = model
        self.hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        reset_peak()
        self.meter.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.step()

    def _count(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            self.meter.tokens = self.meter.tokens + (mask != 0).sum()  # stays on the device: fetching it would wait
        else:
            self.meter.tokens += (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()


def load(spec: dict[str, Any], setting: Setting) -> Any:
    """The model with fresh adapters, as plain transformers and peft make it."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(
        spec["model"],
        dtype=getattr(torch, spec["dtype"]),
        attn_implementation=setting["attention"],
        local_files_only=True,
    )
    model.config.use_cache = False
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec["rank"],
        lora_alpha=spec["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    return get_peft_model(model.to(spec["device"]), lora)


def arguments(spec: dict[str, Any], build: Build) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments and of what is built on it."""
    setting = build.setting
    return {
        "output_dir": build.folder,
        "per_device_train_batch_size": setting["micro"],
        "gradient_accumulation_steps": spec["batch"] // setting["micro"],
        "max_steps": build.steps,
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "bf16": setting["autocast"] and spec["dtype"] == "bfloat16",
        "use_cpu": spec["device"] == "cpu",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_pin_memory": spec["device"] != "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": spec["seed"],
    }
