"""The presets: the paper's settings, and those found by measurement. Imports no torch."""

from __future__ import annotations

from typing import Any

# The paper's numbers (its section 4.1, and ms-swift's defaults of those months: q, k, v; mean loss per
# example; gradient norm clipped at 0.5).
PAPER: dict[str, Any] = {
    "mix": {"order": "shuffle", "repeat": 1},
    "general": {"ratio": 20.0},
    "train": {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "schedule": "linear",
        "warmup_ratio": 0.03,
        "max_grad_norm": 0.5,
        "batch_size": 16,
        "loss_normalization": "example",
        "lora_r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_targets": "qkv",
    },
}
# Found by measurement: docs/lab.md has the runs. The learning rate is `learning_rate_for` the model's size, the
# repetition `repeat_for` the number of task rows. Of 15 rows seen 16 times, 3.5 and 12 times their tokens of general
# data did as well as SFT's best or better (docs/study.md); seen 24 times, 25 times their tokens fell behind.
MODERN: dict[str, Any] = {
    "mix": {"order": "spread"},
    "general": {"ratio": 10.0},
    "train": {
        "max_grad_norm": 1.0,
        "lora_dropout": 0.0,
        "lora_targets": "all-linear",
    },
}


def learning_rate_for(parameters: int) -> float:
    """Peak rate for LoRA on all linear layers of a model of this size.

    1e-3 was measured at 135 M parameters; the fall with the 0.4th power (2e-4 at 7 B, what LoRA users of that
    size commonly take) is not.
    """
    return float(f"{1e-3 * (135e6 / max(parameters, 1)) ** 0.4:.2g}") if parameters > 135e6 else 1e-3


def repeat_for(rows: int) -> int:
    """Times each of so many task rows occurs in the mix: the fewer, the oftener, from 24 down to 4.

    24 was measured at 15 rows and 4 at 65 (docs/lab.md); between them some 360 task rows in all are kept.
    """
    return max(4, min(24, round(360 / max(1, rows))))


PRESETS = {"paper": PAPER, "modern": MODERN}
