"""``python -m bench.gpu``: does the CUDA path work, is it right, how fast is it next to its peers?

Stages are independent: each reports what it raises, prints one line per finding and leaves ``result.json`` whole.
Models are made on the device with random weights: nothing is read from a network.

After an error that leaves the device unusable, and after a stage that patches transformers, a fresh process takes the
place of this one, with the time that is left, and goes on in the same ``result.json``.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from bench.gpu import BEGIN, adapters, checks, goals, peers, speed, study, training
from bench.gpu.run import SIZES, Run, now

STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {  # most valuable first: the goals, then parts on and off
    "facts": checks.facts,
    "attention": checks.attention,
    "equal": checks.equal,
    "resume": checks.resume,
    "train": training.train,
    "memory": training.memory,
    "decode": speed.decode,
    "merge": adapters.merge,
    "profile": speed.profile,
    "capture": checks.capture,
    "peers": peers.peers,
    "trl": peers.trl,
    "liger": peers.liger,
    "unsloth": peers.unsloth,
    "parts": training.parts,
}
# stages with a package that patches classes of transformers for the rest of the process, once it is imported
PATCHING = {"liger": "liger_kernel", "unsloth": "unsloth"}


def main(arguments: list[str] | None = None, begin: float | None = None) -> int:
    """Run what the arguments say; ``begin``: when the deadline's seconds began, on the monotonic clock; None: now."""
    begin = now() if begin is None else begin
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder for result.json and profiles")
    p.add_argument("--stages", default=",".join(STAGES), help=f"of {','.join(STAGES)}")
    p.add_argument("--sizes", default="llama3-8b,smollm2-135m", help=f"of {','.join(SIZES)}")
    p.add_argument("--batch", type=int, default=16, help="rows of a step")
    p.add_argument("--micro", type=int, default=3072, help="tokens of one pass")
    p.add_argument("--deadline", type=float, default=480, help="seconds after which nothing long begins")
    p.add_argument("--go-on", action="store_true", help="add to OUT/result.json; what it has is not measured again")
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
    if a.go_on:
        run.go_on()
    for number, name in enumerate(stages):
        if run.late(name, 10):
            continue
        again = perform(run, name)
        rest = [name] * again + stages[number + 1 :]
        if rest and (run.lost is not None or PATCHING.get(name) in sys.modules):
            replace_process(a, run, rest)
    run.save()  # what there was no time for, too
    print(goals.table(run.stages, run.card), end="")
    return 1 if any(not good for _, _, good in run.findings) else 0


def perform(run: Run, name: str) -> bool:
    """One stage, saved whatever it raises; whether the device was lost within it and what else it measures is open."""
    begin, error = now(), None
    stage = run.stages.setdefault(name, {})
    try:
        stage |= STAGES[name](run)
    except Exception as raised:
        traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}"
    open_parts = run.lost is not None  # noticed by the stage, which kept the error of the part that broke it
    if error is not None:
        stage["error"] = error
        run.find(name, error.splitlines()[0], good=False)
    run.seconds[name] = round(run.seconds.get(name, 0.0) + now() - begin, 1)
    run.save()  # before memory is given back, which fails where the device is lost
    run.clear()
    if run.lost is not None:
        stage["device lost"] = run.lost
        run.find(f"{name}: the device is lost, a fresh process goes on", run.lost, good=False)
        run.save()
    return open_parts and error is None


def replace_process(a: argparse.Namespace, run: Run, stages: list[str]) -> NoReturn:
    """A fresh process in the place of this one, so that the device's memory is free; it goes on with ``stages``."""
    sizes = ",".join(run.sizes)
    options = {"out": a.out, "stages": ",".join(stages), "sizes": sizes, "batch": a.batch, "micro": a.micro}
    options |= {"deadline": round(run.left, 1), "device": a.device}
    pairs = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    flags = ["--go-on", *(["--tiny"] if a.tiny else [])]
    keep_no_files()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *pairs, *flags])


def keep_no_files() -> None:
    """What is open here, the driver's files too, is closed when another program takes this one's place."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with suppress(OSError):  # the listing's own is closed by now
                os.set_inheritable(int(name), False)


if __name__ == "__main__":
    sys.exit(main(begin=BEGIN))
