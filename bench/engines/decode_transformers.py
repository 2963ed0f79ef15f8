"""Decoding by ``transformers.generate`` in left-padded batches.

A row ends at its own limit, the batch with its last row.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from bench.rows import Prompts
from bench.worker import Channel, peak_memory, reset_peak, synchronize


class _RowLimits(StoppingCriteria):
    """Ends each row at its own number of new tokens, and keeps the time of each step."""

    def __init__(self, limits: list[int], width: int, device: torch.device) -> None:
        self.limits, self.width = torch.tensor(limits, device=device), width
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return input_ids.shape[1] - self.width >= self.limits


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Answer ``{"do": "turn", "setting": {"batch", "cache"}, "prompts": n}``, and ``{"do": "try", ...}`` by a forecast.

    A forecast times one batch over a few steps and counts what all batches would take.
    """
    prompts = Prompts.load(spec["prompts"])
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=getattr(torch, spec["dtype"]), local_files_only=True
    )
    model = model.to(spec["device"]).eval()
    model.generation_config.eos_token_id = None
    reset_peak()
    while (message := channel.receive())["do"] in ("turn", "try"):
        batches = _batches(prompts, message["prompts"], message["setting"]["batch"])
        if message["do"] == "try":
            channel.send(seconds=_forecast(model, prompts, batches, message["setting"]), **peak_memory())
            continue
        answers: list[list[int]] = [[] for _ in range(message["prompts"])]
        synchronize()
        begin = time.perf_counter()
        for rows in batches:
            new, _ = _generate(model, prompts, rows, message["setting"])
            for i, ids in zip(rows, new.tolist(), strict=True):
                answers[i] = ids[: prompts.limits[i]]
        synchronize()
        channel.send(seconds=time.perf_counter() - begin, answers=answers, **peak_memory())


def _batches(prompts: Prompts, n: int, size: int) -> list[list[int]]:
    """The first n prompts in batches, alike in length so that they pad little; answers' lengths are not known."""
    order = sorted(range(n), key=lambda i: -len(prompts.ids[i]))
    return [order[begin : begin + size] for begin in range(0, n, size)]


def _generate(
    model: Any, prompts: Prompts, rows: list[int], setting: dict[str, Any], most: int = 1 << 30
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


def _forecast(model: Any, prompts: Prompts, batches: list[list[int]], setting: dict[str, Any], steps: int = 6) -> float:
    """Seconds that all batches would take: prompts in proportion to their tokens, steps by the longest answer."""
    rows = batches[len(batches) // 2]
    begin = time.perf_counter()
    _, stop = _generate(model, prompts, rows, setting, most=steps)
    first = stop.times[0] - begin
    step = (stop.times[-1] - stop.times[1]) / max(1, len(stop.times) - 2)
    rest = sum(max(prompts.limits[i] for i in batch) - 1 for batch in batches)
    return first * sum(map(len, batches)) / len(rows) + step * rest
