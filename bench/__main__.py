"""``python -m bench``: print how fast training, decoding and planning are beside peers."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.options import DECODE_PEERS, PARTS, PEERS, Bench, Options, prepare, require_positive
from tell.config_sections import DEVICES
from tell.errors import TellError


def parse(arguments: list[str] | None = None) -> tuple[Options, bool]:
    """(options, whether JSON is wanted)."""
    d = Options()
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument("--json", action="store_true", help="print JSON alone on stdout")
    p.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    p.add_argument("--peers", default=",".join(PEERS), help=f"of {','.join(PEERS)}, or none")
    p.add_argument("--model", default=d.model, help="folder, hub name or smollm2-135m")
    p.add_argument("--device", default=d.device, choices=("auto", *DEVICES))
    p.add_argument("--seed", type=int, default=d.seed, help="of rows and prompts")
    p.add_argument("--turns", type=int, default=d.turns, help="turns of each engine in training; the median counts")
    p.add_argument("--steps", type=int, default=d.steps, help="optimiser steps of a turn")
    p.add_argument("--warmup", type=int, default=d.warmup, help="steps before the turns")
    p.add_argument("--batch", type=int, default=d.batch, help="rows of a step")
    p.add_argument("--decode-turns", type=int, default=d.decode_turns, help="turns of each engine in decoding")
    p.add_argument("--prompts", type=int, default=d.prompts, help="prompts of a decoding turn")
    p.add_argument("--decode-batch", type=int, default=d.decode_batch, help="rows that tell decodes at a time")
    p.add_argument("--plan-rows", type=int, default=d.plan_rows, help="general rows that are planned over")
    p.add_argument("--length-scale", type=float, default=d.length_scale, help="shrinks all lengths, for trying out")
    p.add_argument("--ceiling-seconds", type=float, default=d.ceiling_seconds, help="time given to the ceiling")
    p.add_argument("--tune-peers", action="store_true", help="look for the peers' best settings anew")
    p.add_argument("--no-plain", dest="plain", action="store_false", help="leave tell's own plain path out")
    given = vars(p.parse_args(arguments))
    given["only"] = _names(given["only"], PARTS, "--only")
    given["peers"] = () if given["peers"] == "none" else _names(given["peers"], PEERS, "--peers")
    counts = ("turns", "steps", "warmup", "batch", "decode_turns", "prompts", "decode_batch", "plan_rows")
    require_positive(given, counts)
    return Options(**{field.name: given[field.name] for field in fields(Options)}), given["json"]


def _names(text: str, known: tuple[str, ...], where: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise TellError(f"{', '.join(unknown) or 'nothing'} is unknown", where=where, remedy=f"Use {','.join(known)}.")
    return names


def measure(bench: Bench) -> dict[str, Any]:
    """The whole result, in the order it is printed."""
    from bench.facts import facts

    options = bench.options
    out: dict[str, Any] = {}
    missing: dict[str, dict[str, str]] = {}
    if "train" in options.only:
        from bench.train import measure_ceiling, measure_training

        ceiling = measure_ceiling(bench)
        out["ceiling_gflops"] = round(ceiling["gflops"], 1)
        out["train"], missing["train"] = measure_training(bench, ceiling)
        out["train_ratio"] = _ratios(out["train"])
        out["ceiling"] = ceiling
    if "decode" in options.only:
        from bench.decode import measure_decoding

        peers = tuple(peer for peer in options.peers if peer in DECODE_PEERS)
        out["decode"], missing["decode"] = measure_decoding(bench, peers)
        out["decode_ratio"] = _ratios(out["decode"])
    if "plan" in options.only:
        from bench.plan import measure_planning

        out["plan"] = measure_planning(bench)
    return {**out, "missing": {part: why for part, why in missing.items() if why}, "facts": facts(bench)}


def _ratios(engines: dict[str, Any]) -> dict[str, float]:
    """How many times faster tell is than each other engine."""
    own = engines["tell"]["tokens_per_s"]
    return {name: round(own / it["tokens_per_s"], 2) for name, it in engines.items() if name != "tell"}


def main(arguments: list[str] | None = None) -> int:
    try:
        options, as_json = parse(arguments)
        folder = Path(tempfile.mkdtemp(prefix="tell-bench-"))  # logs of the workers stay: errors point to them
        result = measure(prepare(options, folder))
    except TellError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        from bench.table import show

        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
