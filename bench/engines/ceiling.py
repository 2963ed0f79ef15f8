"""The product ceiling: how fast this machine multiplies matrices of the model's own shapes."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from bench.worker import Channel, synchronize

ROWS = 2048


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Answer each turn with the best GFLOP/s, and seconds, of a pass over all linear layers but the output layer."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, spec["dtype"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, local_files_only=True)
    head = model.get_output_embeddings()
    weights = [m.weight.data for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    weights = [w.to(spec["device"]) for w in weights]
    inputs = {n: torch.randn(ROWS, n, dtype=dtype, device=spec["device"]) for n in {w.shape[1] for w in weights}}
    outputs = {n: torch.empty(ROWS, n, dtype=dtype, device=spec["device"]) for n in {w.shape[0] for w in weights}}
    flops = 2 * ROWS * sum(w.numel() for w in weights)
    facts = {
        "linear_parameters": sum(w.numel() for w in weights),
        "output_parameters": head.weight.numel(),
        "rows": ROWS,
        "dtype": spec["dtype"],
        "threads": torch.get_num_threads(),
    }
    with torch.inference_mode():
        while channel.receive()["do"] == "turn":
            best, end = math.inf, time.perf_counter() + spec["ceiling_seconds"]
            while best == math.inf or time.perf_counter() < end:
                synchronize()
                begin = time.perf_counter()
                for weight in weights:
                    torch.mm(inputs[weight.shape[1]], weight.t(), out=outputs[weight.shape[0]])
                synchronize()
                best = min(best, time.perf_counter() - begin)
            channel.send(gflops=flops / best / 1e9, seconds=best, **facts)
