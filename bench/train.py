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
from bench.settings import Setting, find_best, train_choices, train_start
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
    if options.plain:
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
    expected = turn_tokens(rows, options.batch, turns)[1:]  # without the warm-up
    sizes = {engine: it["turns"][0]["trainable_parameters"] for engine, it in results.items()}
    if len(set(sizes.values())) > 1:
        raise TellError(f"the engines train adapters of different sizes ({sizes})", where="bench")
    out = {engine: summary(results[engine], expected, rows, ceiling) for engine in results}
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


def _setting(bench: Bench, engine: str, spec: dict[str, Any], rows: Rows) -> tuple[Setting, list[Any]]:
    """(best setting of an engine, the tries behind it), from an earlier run where there was one."""
    if engine in OURS:
        return ({"fast": "off"} if engine == "tell_plain" else {}), []
    key = bench.key("train", engine)
    batch = bench.options.batch
    expected = turn_tokens(rows, batch, [1, 1])
    warm: list[Worker] = []

    def launch() -> Worker:
        return _start(engine, {**spec, "trying": True}, bench)

    def measure(worker: Worker, setting: Setting) -> float:
        order = order_rows(rows.lengths[: 2 * batch], batch, [1, 1], setting["order"])
        worker.ask(do="build", setting=setting, order=order)
        speed = turn_speed(worker.ask(do="turn", steps=1), expected[0])
        if worker not in warm:  # the first step of a process pays for what later ones find ready
            speed = turn_speed(worker.ask(do="turn", steps=1), expected[1])
            warm.append(worker)
        worker.tell(do="stop")
        return speed

    choices = train_choices(engine, batch, bench.dtype_name == "bf16")
    return find_best(key, engine, train_start(engine), choices, launch, measure, anew=bench.options.tune_peers)


def turn_tokens(rows: Rows, batch: int, turns: Sequence[int]) -> list[int]:
    """Real tokens of each turn, in steps of ``batch`` rows from row 0 on."""
    ends = np.cumsum([0, *turns]) * batch
    return [int(rows.starts[end] - rows.starts[begin]) for begin, end in pairwise(ends)]


def turn_speed(answer: dict[str, Any], tokens: int) -> float:
    """Real tokens a second of a turn.

    Raises:
        TellError: the engine was not fed the ``tokens`` that the rows of the turn have.
    """
    if answer["tokens"] != tokens:
        raise TellError(f"an engine was fed {answer['tokens']:,} tokens where a turn has {tokens:,}", where="bench")
    return tokens / answer["seconds"]


def summary(result: dict[str, Any], expected: list[int], rows: Rows, ceiling: dict[str, Any]) -> dict[str, Any]:
    """What is printed of an engine.

    Args:
        result: its answers of each turn, setting and versions.
        expected: real tokens of each turn.

    Raises:
        TellError: as `turn_speed`.
    """
    turns = result["turns"]
    speeds = [turn_speed(turn, tokens) for turn, tokens in zip(turns, expected, strict=True)]
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
