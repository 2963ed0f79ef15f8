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
        "general_target": "text",
        "loss_normalization": "example",
        "lora_r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_targets": "qkv",
    },
    "generate": {"greedy": False, "temperature": 0.3, "top_k": 20, "top_p": 0.7, "repetition_penalty": 1.05},
}
# Training found by measurement (runs: docs/explanation/lab.md). The rate is `learning_rate_for` the model's size
# and the mixture, repetitions `repeat_for` the number of task rows, general data `general_tokens_for` their tokens.
MODERN: dict[str, Any] = {
    "mix": {"order": "spread"},
    "train": {
        "max_grad_norm": 1.0,
        "lora_dropout": 0.0,
        "lora_targets": "all-linear",
    },
    # Greedy, without repetition penalty: structured answers repeat keys and words of the prompt.
    "generate": {"greedy": True, "repetition_penalty": 1.0, "closed": "fused"},
}


def learning_rate_for(parameters: int, *, mixed: bool) -> float:
    """Peak rate for LoRA on all linear layers of a model of this size.

    Measured at 135 M parameters: 1e-3 for task rows alone, where half and twice of it do worse, and 2e-3 among general
    rows (docs/explanation/lab.md). The fall with the 0.4th power (2e-4 at 7 B, what LoRA users of that size commonly
    take) is not measured.

    Args:
        mixed: there are general rows. Their gradient stays noisy to the end; Adam divides by it, so that task rows move
            the weights less than they do alone.
    """
    best = 2e-3 if mixed else 1e-3
    return float(f"{best * (135e6 / max(parameters, 1)) ** 0.4:.2g}") if parameters > 135e6 else best


def repeat_for(rows: int) -> int:
    """Times that each of so many task rows occurs in the mix: 24 up to 15 rows, 16 to 60, 8 at 115, 4 from 230 on.

    24 was measured at 15 rows (docs/explanation/lab.md), 8 against 4 and 16 at 60 and 115, where 16 give more right
    fields at 60 and 8 the lower answer loss (docs/explanation/study.md); more than 115 rows were not measured.
    """
    rows = max(1, rows)
    return max(4, min(24, round(max(360 / rows, min(16, 960 / rows)))))


def general_tokens_for(task_tokens: int) -> float:
    """General tokens for so many task tokens, rows counted once: 3e4, within 1 and 10 times the task's.

    From 3e4 to 1e5 did as well as any other amount up to 3e5, with 15 rows (8e3 tokens) and with 115 (6e4) of one
    task (docs/explanation/study.md), and 3e4 take the least time. Tasks of more than 1e5 tokens were not measured.
    """
    return min(10.0 * task_tokens, max(3e4, float(task_tokens)))


PRESETS = {"paper": PAPER, "modern": MODERN}
