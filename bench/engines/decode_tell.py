"""Decoding by tell's own engine."""

from __future__ import annotations

import time
from typing import Any

from bench.rows import Prompts
from bench.worker import Channel, peak_memory, reset_peak, synchronize
from tell.generate.engine import Engine
from tell.generate.sampler import Decoding
from tell.models.find import find_model
from tell.models.load import load_model


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Answer ``{"do": "turn", "setting": {"batch": n}, "prompts": n}`` with the time of the first n prompts."""
    prompts = Prompts.load(spec["prompts"])
    loaded = load_model(find_model(spec["model"]), device=spec["device"], dtype=spec["dtype_name"])
    engine = Engine(loaded.model, device=loaded.device)
    reset_peak()
    while (message := channel.receive())["do"] == "turn":
        n = message["prompts"]
        limits = prompts.limits[:n]
        decoding = Decoding(
            max_new_tokens=max(limits),
            stop_ids=(),
            greedy=True,
            repetition_penalty=1.0,
            batch_size=message["setting"]["batch"],
        )
        synchronize()
        begin = time.perf_counter()
        answers = engine.generate(prompts.ids[:n], decoding, limits=limits)
        synchronize()
        seconds = time.perf_counter() - begin
        channel.send(seconds=seconds, answers=[answer.ids for answer in answers], **peak_memory())
