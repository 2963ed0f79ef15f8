"""Decoding: engines in turn over prompts that share a prefix, greedy, each answer with a length of its own."""

from __future__ import annotations

import statistics
from typing import Any

from bench.drive import Worker, say
from bench.environments import environment
from bench.options import Bench
from bench.rows import Prompts, make_prompts, plain_tokens
from bench.settings import DECODE_START, Setting, decode_choices, find_best
from tell.errors import TellError


def measure_decoding(bench: Bench, peers: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """(results by engine, reasons by engine that is missing)."""
    options = bench.options
    prompts = make_prompts(options.prompts, plain_tokens(bench.files.path), options.seed, options.length_scale)
    path = bench.folder / "prompts.json"
    prompts.save(path)
    spec = bench.spec(prompts=str(path))
    workers: dict[str, Worker] = {}
    results: dict[str, Any] = {}
    missing: dict[str, str] = {}
    try:
        for engine in ("tell", *peers):
            try:
                setting, tries = _setting(bench, engine, spec, prompts)
                workers[engine] = _start(engine, spec, bench)
                say(f"{engine}: warming up")
                if engine == "tell":
                    workers[engine].ask(do="turn", setting=setting, prompts=min(setting["batch"], options.prompts))
                else:  # a few steps of one batch: a whole one takes most of a turn
                    workers[engine].ask(do="try", setting=setting, prompts=options.prompts)
                results[engine] = {"setting": setting, "tries": tries, "turns": []}
            except TellError as error:
                missing[engine] = error.what
                say(f"{engine}: left out: {error}")
                if engine == "tell":
                    raise
                if engine in workers:
                    workers.pop(engine).close(kill=True)
        for turn in range(options.decode_turns):
            for engine, worker in workers.items():
                answer = worker.ask(do="turn", setting=results[engine]["setting"], prompts=options.prompts)
                if [len(ids) for ids in answer["answers"]] != prompts.limits:
                    raise TellError("an answer has not the length that was asked for", where=engine)
                results[engine]["turns"].append(answer)
                say(f"turn {turn + 1}, {engine}: {sum(prompts.limits) / answer['seconds']:,.0f} new tokens/s")
    finally:
        for worker in workers.values():
            worker.close(kill=True)
    own = results["tell"]["turns"][0]["answers"]
    return {engine: summary(results[engine], prompts, own) for engine in results}, missing


def _start(engine: str, spec: dict[str, Any], bench: Bench) -> Worker:
    if engine == "tell":
        return Worker("decode-tell", "decode_tell", spec, bench.folder)
    return Worker(f"decode-{engine}", f"decode_{engine}", spec, bench.folder, python=environment(engine))


def _setting(bench: Bench, engine: str, spec: dict[str, Any], prompts: Prompts) -> tuple[Setting, list[Any]]:
    """(best setting of an engine, the tries behind it), from an earlier run where there was one."""
    if engine == "tell":
        return {"batch": min(bench.options.decode_batch, len(prompts.ids))}, []
    key = bench.key("decode", f"{engine} | {len(prompts.ids)} prompts")
    choices = decode_choices(engine, len(prompts.ids))

    def measure(worker: Worker, setting: Setting) -> float:
        answer = worker.ask(do="try", setting=setting, prompts=len(prompts.ids))
        return sum(prompts.limits) / answer["seconds"]

    def launch() -> Worker:
        return _start(engine, {**spec, "trying": True}, bench)

    return find_best(key, engine, DECODE_START, choices, launch, measure, anew=bench.options.tune_peers)


def summary(result: dict[str, Any], prompts: Prompts, own: list[list[int]]) -> dict[str, Any]:
    """What is printed of an engine.

    Args:
        result: its answers of each turn, setting and tries.
        own: tell's answers.
    """
    turns = result["turns"]
    speeds = [sum(prompts.limits) / turn["seconds"] for turn in turns]
    same = [a == b for a, b in zip(turns[0]["answers"], own, strict=True)]
    return {
        "tokens_per_s": round(statistics.median(speeds), 1),
        "spread": [round(min(speeds), 1), round(max(speeds), 1)],
        **{key: round(max(turn[key] for turn in turns), 1) for key in turns[0] if key.startswith("peak_")},
        "same_answers_as_tell": round(sum(same) / len(same), 4),
        "setting": result["setting"],
        "tries": result["tries"],
    }
