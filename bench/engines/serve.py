"""The loops that engines share: builds to train, prompts to answer. Imports neither transformers nor ``tell``."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bench.rows import Prompts, Rows
from bench.worker import Channel, Meter, Stopped, peak_memory, reset_peak, synchronize

Setting = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Build:
    """What an engine is to make ready for training.

    Attributes:
        setting: see `bench.settings`.
        rows: all rows there are.
        order: numbers of those to train on, in that order.
        steps: optimiser steps that ``order`` makes.
        folder: for files; removed with the build.
        meter: to hold the training between turns.
    """

    setting: Setting
    rows: Rows
    order: list[int]
    steps: int
    folder: str
    meter: Meter

    def examples(self) -> list[dict[str, list[int]]]:
        """The rows in order as peers take them: ``input_ids`` and ``labels``."""
        return [{"input_ids": self.rows.row(i)[0].tolist(), "labels": self.rows.labels(i)} for i in self.order]


def serve_builds(
    channel: Channel, spec: dict[str, Any], make: Callable[[Build], Callable[[], Any]], versions: dict[str, str]
) -> None:
    """Answer ``{"do": "build", "setting": {...}, "order": [...]}`` when it is made, then train until it is stopped.

    Args:
        make: gives the call that trains.
        versions: told to the driver.
    """
    rows = Rows.load(spec["rows"])
    while (message := channel.receive())["do"] == "build":
        order = message["order"]
        steps = -(-len(order) // spec["batch"])
        with tempfile.TemporaryDirectory() as folder:
            train = make(Build(message["setting"], rows, order, steps, folder, Meter(channel)))
            channel.send(built=True, versions=versions)
            with contextlib.suppress(Stopped):
                train()


def serve_prompts(
    channel: Channel,
    spec: dict[str, Any],
    answer: Callable[[Prompts, Setting], list[list[int]]],
    forecast: Callable[[Prompts, Setting], float] | None = None,
) -> None:
    """Answer ``{"do": "turn", "setting": {...}, "prompts": n}`` with answers of the first n prompts and their time.

    Args:
        answer: gives the new tokens of each prompt.
        forecast: gives the seconds that ``answer`` would take, which is what ``{"do": "try", ...}`` asks for.
    """
    prompts = Prompts.load(spec["prompts"])
    reset_peak()
    while (message := channel.receive())["do"] != "stop":
        asked = Prompts(prompts.ids[: message["prompts"]], prompts.limits[: message["prompts"]])
        if message["do"] == "try" and forecast:
            channel.send(seconds=forecast(asked, message["setting"]), **peak_memory())
            continue
        synchronize()
        begin = time.perf_counter()
        answers = answer(asked, message["setting"])
        synchronize()
        channel.send(seconds=time.perf_counter() - begin, answers=answers, **peak_memory())


def versions(*names: str) -> dict[str, str]:
    """Installed versions of ``names`` and of what they run on."""
    out = {}
    for name in (*names, "torch", "transformers", "peft", "accelerate"):
        with contextlib.suppress(PackageNotFoundError):
            out[name] = version(name)
    return out
