"""Which settings of a peer are tried, and what is remembered of the tries."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from bench.drive import Worker, say
from tell.errors import TellError
from tell.files import write_json
from tell.home import make_folder, tell_home

Setting = dict[str, Any]
FAR_BEHIND = 0.8  # of the best: larger batches of that kind are not tried
DECODE_START: Setting = {"batch": 16, "cache": "dynamic"}


def train_start(engine: str) -> Setting:
    """The first setting to try; LLaMA-Factory always computes bf16 under autocast."""
    autocast = engine == "llamafactory"
    return {"micro": 1, "order": "given", "attention": "sdpa", "autocast": autocast, "padding_free": False}


def train_choices(engine: str, batch: int, bf16: bool) -> list[list[Setting]]:
    """Groups of changes to try one after another, the best so far kept: see `search`.

    Packing is not among them: it would change the rows of a step. Gradient checkpointing is off everywhere.
    """
    sizes = [(2, "step"), (4, "step"), (16, "turn")]
    groups = [
        [{"attention": "eager"}],
        [{"micro": m, "order": how} for m, how in sizes if batch % m == 0],
    ]
    if bf16 and not train_start(engine)["autocast"]:
        groups.insert(0, [{"autocast": True}])
    if engine in ("trl", "transformers"):  # a dense block-diagonal mask stands in for flash attention
        free = [{"micro": m, "order": how, "padding_free": True, "attention": "sdpa"} for m, how in sizes[1:]]
        groups.append([change for change in free if batch % change["micro"] == 0])
    return groups


def decode_choices(engine: str, prompts: int) -> list[list[Setting]]:
    """As `train_choices`, for decoding: batch size, then the kind of cache."""
    sizes = [{"batch": n} for n in (32, 64, 128) if n <= max(32, prompts)]
    return [sizes, [{"cache": "static"}]] if engine == "transformers" else [sizes]


def search(
    start: Setting, groups: list[list[Setting]], measure: Callable[[Setting], float | None]
) -> tuple[Setting, list[dict[str, Any]]]:
    """(best setting, every try with its tokens a second) by trying each group's changes on the best so far.

    A group goes from small to large; what is far behind the best ends it, as does a try that failed.

    Args:
        measure: tokens a second of a setting; None when it failed.
    """
    tries: list[dict[str, Any]] = []
    best, speed = start, 0.0
    for group in [[{}], *groups]:
        for change in group:
            setting = {**best, **change}
            if any(t["setting"] == setting for t in tries):
                continue
            got = measure(setting)
            tries.append({"setting": setting, "tokens_per_s": got})
            if got is None or got < FAR_BEHIND * speed:
                break
            if got > speed:
                best, speed = setting, got
    return best, tries


def find_best(
    key: str,
    engine: str,
    start: Setting,
    groups: list[list[Setting]],
    launch: Callable[[], Worker],
    measure: Callable[[Worker, Setting], float],
    *,
    anew: bool,
) -> tuple[Setting, list[dict[str, Any]]]:
    """What `search` finds with a process of the engine, or what an earlier run on this machine found.

    Args:
        key: to keep the outcome under.
        engine: for messages.
        launch: starts the process; called again after a setting that failed in it.
        measure: tokens a second of a setting.
        anew: look for the best setting even where one is known.

    Raises:
        TellError: no setting ran; the first reason is in the message.
    """
    if not anew and (known := recall(key)):
        return known["setting"], known["tries"]
    say(f"{engine}: looking for its best settings")
    worker = launch()
    failures: list[str] = []

    def attempt(setting: Setting) -> float | None:
        nonlocal worker
        name = " ".join([f"{engine}:", *(f"{key}={value}" for key, value in setting.items())])
        try:
            if worker.process.poll() is not None:
                worker = launch()
            speed = measure(worker, setting)
        except TellError as error:
            say(f"{name}: {error.what}")
            failures.append(error.what)
            worker.close(kill=True)
            return None
        say(f"{name}: {speed:,.0f} tokens/s")
        return speed

    try:
        best, tries = search(start, groups, attempt)
    finally:
        worker.close(kill=True)
    if len(failures) == len(tries):
        raise TellError(f"none of its settings ran ({failures[0]})", where=engine, remedy=f"Read {worker.log}.")
    remember(key, {"setting": best, "tries": tries})
    return best, tries


def recall(key: str) -> dict[str, Any] | None:
    """What `remember` kept under ``key``: ``{"setting": ..., "tries": [...]}``, or None."""
    path = tell_home() / "bench" / "settings.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get(key)


def remember(key: str, found: dict[str, Any]) -> None:
    """Keep the outcome of a search for later runs on this machine."""
    path = make_folder(tell_home() / "bench") / "settings.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**known, key: found})
