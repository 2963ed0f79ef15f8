"""Decoding by tell's own engine."""

from __future__ import annotations

from typing import Any

from bench.engines.serve import Setting, serve_prompts
from bench.rows import Prompts
from bench.worker import Channel
from tell.decode.engine import Engine
from tell.decode.sampler import Decoding
from tell.models.find import find_model
from tell.models.load import load_model


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Serve prompts; the setting is ``{"batch": rows at a time}``."""
    loaded = load_model(find_model(spec["model"]), device=spec["device"], dtype=spec["dtype_name"])
    engine = Engine(loaded.model, device=loaded.device)

    def answer(prompts: Prompts, setting: Setting) -> list[list[int]]:
        decoding = Decoding(
            max_new_tokens=max(prompts.limits),
            stop_ids=(),
            greedy=True,
            repetition_penalty=1.0,
            batch_size=setting["batch"],
        )
        return [given.ids for given in engine.generate(prompts.ids, decoding, limits=prompts.limits)]

    serve_prompts(channel, spec, answer)
