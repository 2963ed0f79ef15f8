"""``python -m bench.gpu``: does the CUDA path work, is it right, how fast is it next to its peers?

Stages are independent: each reports what it raises, prints one line per finding and leaves ``result.json`` whole.
Models are made on the device with random weights: nothing is read from a network.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu import BEGIN, checks, goals, peers, speed, study, training
from bench.gpu.run import SIZES, Run

STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {  # most valuable first
    "facts": checks.facts,
    "attention": checks.attention,
    "equal": checks.equal,
    "resume": checks.resume,
    "train": training.train,
    "memory": training.memory,
    "decode": speed.decode,
    "merge": checks.merge,
    "peers": peers.peers,
    "profile": speed.profile,
    "trl": peers.trl,
    "liger": peers.liger,  # these two patch transformers' classes for the rest of the process
    "unsloth": peers.unsloth,
}


def main(arguments: list[str] | None = None, begin: float | None = None) -> int:
    """Run what the arguments say; ``begin``: when the deadline's seconds began, on the monotonic clock; None: now."""
    begin = time.monotonic() if begin is None else begin
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder for result.json and profiles")
    p.add_argument("--stages", default=",".join(STAGES), help=f"of {','.join(STAGES)}")
    p.add_argument("--sizes", default="llama3-8b,smollm2-135m", help=f"of {','.join(SIZES)}")
    p.add_argument("--batch", type=int, default=16, help="rows of a step")
    p.add_argument("--micro", type=int, default=3072, help="tokens of one pass")
    p.add_argument("--deadline", type=float, default=480, help="seconds after which nothing long begins")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--tiny", action="store_true", help="a model of two layers: a rehearsal")
    study.add_arguments(p.add_argument_group("study"))
    a = p.parse_args(arguments)
    if a.study:
        return study.main(a, begin)
    sizes = ["tiny"] if a.tiny else a.sizes.split(",")
    stages = a.stages.split(",")
    if unknown := [name for name in stages if name not in STAGES] + [name for name in sizes if name not in SIZES]:
        p.error(f"unknown: {', '.join(unknown)}")
    run = Run(a.out, a.device, a.tiny, sizes, a.batch, a.micro, a.deadline, begin=begin)
    for name in stages:
        if run.late(name, 10):
            continue
        at = time.monotonic()
        try:
            run.stages[name] = {**run.stages.get(name, {}), **STAGES[name](run)}
        except Exception as error:
            traceback.print_exc()
            run.stages.setdefault(name, {})["error"] = f"{type(error).__name__}: {error}"
            run.find(name, f"{type(error).__name__}: {error}".splitlines()[0], good=False)
        run.seconds[name] = round(time.monotonic() - at, 1)
        run.clear()
        run.save()
    print(goals.table(run.stages, run.card), end="")
    return 1 if any(not good for _, _, good in run.findings) else 0


if __name__ == "__main__":
    sys.exit(main(begin=BEGIN))
