"""Decoding by ``transformers.generate`` in left-padded batches.

A row ends at its own limit, the batch with its last row.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from bench.engines.serve import Setting, serve_prompts
from bench.rows import Prompts
from bench.worker import Channel


class _RowLimits(StoppingCriteria):
    """Ends each row at its own number of new tokens, and keeps the time of each step."""

    def __init__(self, limits: list[int], width: int, device: torch.device) -> None:
        self.limits, self.width = torch.tensor(limits, device=device), width
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return input_ids.shape[1] - self.width >= self.limits


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Serve prompts; the setting is ``{"batch": rows at a time, "cache": "dynamic" or "static"}``."""
    dtype = getattr(torch, spec["dtype"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, local_files_only=True)
    model = model.to(spec["device"]).eval()
    model.generation_config.eos_token_id = None

    def answer(prompts: Prompts, setting: Setting) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts.ids]
        for rows in _batches(prompts, setting["batch"]):
            new, _ = _generate(model, prompts, rows, setting)
            for i, ids in zip(rows, new.tolist(), strict=True):
                answers[i] = ids[: prompts.limits[i]]
        return answers

    serve_prompts(channel, spec, answer, partial(_forecast, model))


def _batches(prompts: Prompts, size: int) -> list[list[int]]:
    """Numbers of the prompts in batches, alike in length so that they pad little; answers' lengths are not known."""
    order = sorted(range(len(prompts.ids)), key=lambda i: -len(prompts.ids[i]))
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def _generate(
    model: Any, prompts: Prompts, rows: list[int], setting: Setting, most: int = 1 << 30
) -> tuple[torch.Tensor, _RowLimits]:
    """((rows, steps) new tokens, the criterion with the times of its steps)."""
    width = max(len(prompts.ids[i]) for i in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for at, i in enumerate(rows):
        ids[at, width - len(prompts.ids[i]) :] = torch.tensor(prompts.ids[i])
        mask[at, width - len(prompts.ids[i]) :] = 1
    limits = [min(prompts.limits[i], most) for i in rows]
    stop = _RowLimits(limits, width, model.device)
    cache = {"cache_implementation": "static"} if setting["cache"] == "static" else {}
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(prompts.limits[i] for i in rows),  # a static cache is as large in a forecast as in earnest
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([stop]),
        **cache,
    )
    return out[:, width:], stop


def _forecast(model: Any, prompts: Prompts, setting: Setting, steps: int = 6) -> float:
    """Seconds that all batches would take: prompts in proportion to their number, steps by the longest answer.

    One batch is timed, over a few steps.
    """
    batches = _batches(prompts, setting["batch"])
    rows = batches[len(batches) // 2]
    begin = time.perf_counter()
    _, stop = _generate(model, prompts, rows, setting, most=steps)
    first = stop.times[0] - begin
    step = (stop.times[-1] - stop.times[1]) / max(1, len(stop.times) - 2)
    rest = sum(max(prompts.limits[i] for i in batch) - 1 for batch in batches)
    return first * sum(map(len, batches)) / len(rows) + step * rest
