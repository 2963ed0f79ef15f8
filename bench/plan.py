"""Planning: ``tell plan`` as a user starts it, over an instruction set of Alpaca's size, cold and warm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.drive import ROOT, say
from bench.options import Bench
from tell.errors import TellError

TASK_ROWS, GENERAL_TOKENS = 15, 200_000
WORDS = tuple(
    """the of and to in a is that it for as with was on are be by this from or an at which have not has can their
more other when use one people time write sentence following example describe list number word company idea water
data explain between system method process energy small large create food country story important different product
information model language question answer change world light year work student health environment development
computer strategy customer research technology population temperature government government's community education
machine learning algorithm ingredients customers products sentences examples features benefits steps reason""".split()  # noqa: SIM905
)


def make_instructions(n: int, seed: int) -> list[dict[str, str]]:
    """n rows of instruction, input (four in ten) and output of about 10, 15 and 44 words, as Alpaca's."""
    rng = np.random.default_rng([seed, 3])
    share = 1 / np.arange(2, len(WORDS) + 2)
    counts = np.stack([rng.lognormal(np.log(mean), 0.5, n) for mean in (10, 15, 44)], axis=1).round().astype(int)
    counts = counts.clip(2, 400)
    counts[rng.random(n) > 0.4, 1] = 0
    words = rng.choice(len(WORDS), int(counts.sum()), p=share / share.sum())
    rows, at = [], 0
    for number, row in enumerate(counts):
        parts = []
        for count in row:
            text = " ".join(WORDS[i] for i in words[at : at + count])
            parts.append(f"{text.capitalize()}{', ' + str(number) if count > 8 else ''}." if text else "")
            at += int(count)
        rows.append(dict(zip(("instruction", "input", "output"), parts, strict=True)))
    return rows


def measure_planning(bench: Bench) -> dict[str, Any]:
    """``{"cold_s", "warm_s", "rows"}``: whole process, first with an empty cache, then again.

    The model's folder is named, so that finding or converting it is no part of the time.
    """
    rows = make_instructions(bench.options.plan_rows + TASK_ROWS, bench.options.seed)
    general, task = bench.folder / "general.json", bench.folder / "task.jsonl"
    general.write_text(json.dumps(rows[TASK_ROWS:]), encoding="utf-8")
    lines = ({"prompt": row["instruction"], "answer": row["output"]} for row in rows[:TASK_ROWS])
    task.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    tokens = min(GENERAL_TOKENS, 20 * bench.options.plan_rows)
    command = [sys.executable, "-m", "tell", "plan", str(task), "--general", str(general)]
    command += ["--general-tokens", str(tokens), "--model", str(bench.files.path), "--json"]
    seconds = [_timed(command, bench.folder / "home") for _ in range(2)]
    say(f"tell plan, {bench.options.plan_rows:,} rows: {seconds[0]:.1f} s cold, {seconds[1]:.1f} s warm")
    return {"cold_s": round(seconds[0], 2), "warm_s": round(seconds[1], 2), "rows": bench.options.plan_rows}


def _timed(command: list[str], home: Path) -> float:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TELL_HOME": str(home), "PYTHONPATH": path}
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home.parent)
    seconds = time.perf_counter() - begin
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise TellError(f"tell plan failed ({lines[-1] if lines else done.returncode})", where="bench plan")
    plan = json.loads(done.stdout)
    if not plan:
        raise TellError("tell plan printed nothing", where="bench plan")
    return seconds
