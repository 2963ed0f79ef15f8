"""Training: all engines in turn over the same rows, and the share of the product ceiling they reach."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from bench.drive import Worker, say
from bench.environments import environment
from bench.options import Bench
from bench.rows import Rows, make_rows, order_rows, plain_tokens
from bench.settings import recall, remember, search, train_choices, train_start
from tell.config import TrainConfig
from tell.errors import TellError

OURS = ("tell", "tell_plain")


def measure_ceiling(bench: Bench) -> dict[str, Any]:
    """``{"gflops": best, "linear_parameters", "output_parameters", ...}`` of products at 2,048 rows."""
    worker = Worker("ceiling", "ceiling", bench.spec(ceiling_seconds=bench.options.ceiling_seconds), bench.folder)
    try:
        return worker.ask(do="turn")
    finally:
        worker.close()


def measure_training(bench: Bench, ceiling: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results by engine, reasons by engine that is missing)."""
    options = bench.options
    turns = _turns(bench)
    rows = make_rows(sum(turns) * options.batch, plain_tokens(bench.files.path), options.seed, options.length_scale)
    path = bench.folder / "rows.npz"
    rows.save(path)
    spec = bench.spec(rows=str(path))
    engines = ["tell", *options.peers]
    if options.plain and "fast" in TrainConfig.model_fields:
        engines.insert(1, "tell_plain")
    workers: dict[str, Worker] = {}
    results: dict[str, Any] = {}
    missing: dict[str, str] = {}
    try:
        for stage in (_choose, _launch, _warm):  # all settings first: nothing else may run while they are tried
            for engine in [e for e in engines if e not in missing]:
                try:
                    stage(bench, engine, spec, rows, results.setdefault(engine, {"turns": []}), workers)
                except TellError as error:
                    if engine == "tell":
                        raise
                    missing[engine] = error.what
                    results.pop(engine)
                    say(f"{engine}: left out: {error}")
                    if engine in workers:
                        workers.pop(engine).close(kill=True)
        for turn in range(options.turns):
            for engine, worker in workers.items():
                answer = worker.ask(do="turn", steps=options.steps)
                results[engine]["turns"].append(answer)
                say(f"turn {turn + 1}, {engine}: {answer['tokens'] / answer['seconds']:,.0f} tokens/s")
    finally:
        for worker in workers.values():
            worker.close(kill=True)
    expected = _turn_tokens(rows, turns)
    sizes = {engine: it["turns"][0]["trainable_parameters"] for engine, it in results.items()}
    if len(set(sizes.values())) > 1:
        raise TellError(f"the engines train adapters of different sizes ({sizes})", where="bench")
    out = {engine: _summary(results[engine], expected, rows, ceiling) for engine in results}
    return out, missing


def _choose(
    bench: Bench, engine: str, spec: dict[str, Any], rows: Rows, result: dict[str, Any], _: dict[str, Worker]
) -> None:
    result["setting"], result["tries"] = _setting(bench, engine, spec, rows)


def _launch(
    bench: Bench, engine: str, spec: dict[str, Any], rows: Rows, result: dict[str, Any], workers: dict[str, Worker]
) -> None:
    """Start an engine's process; it goes on importing while the next one is started."""
    workers[engine] = _start(engine, spec, bench)
    order = order_rows(rows.lengths, bench.options.batch, _turns(bench), result["setting"].get("order", "given"))
    workers[engine].tell(do="build", setting=result["setting"], order=order)


def _warm(
    bench: Bench, engine: str, spec: dict[str, Any], rows: Rows, result: dict[str, Any], workers: dict[str, Worker]
) -> None:
    result["versions"] = workers[engine].answer()["versions"]
    say(f"{engine}: warming up, {bench.options.warmup} steps")
    workers[engine].ask(do="turn", steps=bench.options.warmup)


def _turns(bench: Bench) -> list[int]:
    """Steps of each turn, the warm-up first."""
    return [bench.options.warmup, *[bench.options.steps] * bench.options.turns]


def _start(engine: str, spec: dict[str, Any], bench: Bench) -> Worker:
    if engine in OURS:
        return Worker(engine, "train_tell", spec, bench.folder)
    return Worker(engine, f"train_{engine}", spec, bench.folder, python=environment(engine))


def _setting(bench: Bench, engine: str, spec: dict[str, Any], rows: Rows) -> tuple[dict[str, Any], list[Any]]:
    """(best setting of an engine, the tries behind it), from an earlier run where there was one."""
    if engine in OURS:
        return ({"fast": "off"} if engine == "tell_plain" else {}), []
    key = bench.key("train", engine)
    if not bench.options.tune_peers and (known := recall(key)):
        return known["setting"], known["tries"]
    say(f"{engine}: looking for its best settings")
    spec = {**spec, "trying": True}
    batch = bench.options.batch
    worker = _start(engine, spec, bench)

    def measure(setting: dict[str, Any]) -> float | None:
        nonlocal worker
        order = order_rows(rows.lengths[: 2 * batch], batch, [1, 1], setting["order"])
        try:
            if worker.process.poll() is not None:
                worker = _start(engine, spec, bench)
            worker.ask(do="build", setting=setting, order=order)
            first = not tries_made
            tries_made.append(setting)
            answer = worker.ask(do="turn", steps=1)
            if first:  # the first step of a process pays for what later ones find ready
                answer = worker.ask(do="turn", steps=1)
            worker.tell(do="stop")
        except TellError as error:
            say(f"{engine} {_short(setting)}: {error.what}")
            failures.append(error.what)
            worker.close(kill=True)
            return None
        speed = answer["tokens"] / answer["seconds"]
        say(f"{engine} {_short(setting)}: {speed:,.0f} tokens/s")
        return speed

    tries_made: list[dict[str, Any]] = []
    failures: list[str] = []
    try:
        best, tries = search(train_start(engine), train_choices(engine, batch, bench.dtype_name == "bf16"), measure)
    finally:
        worker.close(kill=True)
    if all(t["tokens_per_s"] is None for t in tries):
        raise TellError(f"none of its settings ran ({failures[0]})", where=engine, remedy=f"Read {worker.log}.")
    remember(key, {"setting": best, "tries": tries})
    return best, tries


def _short(setting: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in setting.items())


def _turn_tokens(rows: Rows, turns: Sequence[int]) -> list[int]:
    """Real tokens of each turn after the warm-up, for a batch size of rows / steps."""
    batch = len(rows) // sum(turns)
    ends = np.cumsum(turns) * batch
    return [int(rows.starts[end] - rows.starts[begin]) for begin, end in pairwise(ends)]


def _summary(result: dict[str, Any], expected: list[int], rows: Rows, ceiling: dict[str, Any]) -> dict[str, Any]:
    """What is printed of an engine. Raises TellError where it was not fed the rows of its turns."""
    turns = result["turns"]
    for turn, tokens in zip(turns, expected, strict=True):
        if turn["tokens"] != tokens:
            raise TellError(f"an engine was fed {turn['tokens']:,} tokens where a turn has {tokens:,}", where="bench")
    speeds = [turn["tokens"] / turn["seconds"] for turn in turns]
    speed = statistics.median(speeds)
    per_token = flops_per_token(rows, ceiling["linear_parameters"], ceiling["output_parameters"])
    return {
        "tokens_per_s": round(speed, 1),
        "spread": [round(min(speeds), 1), round(max(speeds), 1)],
        **{key: round(max(turn[key] for turn in turns), 1) for key in turns[0] if key.startswith("peak_")},
        "ceiling_share": round(speed * per_token / ceiling["gflops"] / 1e9, 4),
        "trainable_parameters": turns[0]["trainable_parameters"],
        "setting": result["setting"],
        "tries": result["tries"],
        "versions": result["versions"],
    }


def flops_per_token(rows: Rows, linear: int, output: int) -> float:
    """4 for each parameter of the linear layers, and of the output layer where a token is trained; no attention."""
    return 4.0 * linear + 4.0 * output * float(rows.trained.sum() / rows.lengths.sum())
