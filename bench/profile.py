"""``python -m bench.profile``: where the time of tell's training step goes, on the rows of the benchmark.

Matrix products and kernels are timed one by one from outside; what is left over is Python, dispatch, copies, page
faults and the optimiser. Only meaningful on a processor, where a call returns when its work is done.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.options import require_positive
from bench.rows import Rows, make_rows, plain_tokens
from tell.config_sections import TrainConfig
from tell.errors import TellError
from tell.kernels import keep_memory, library, reason
from tell.kernels.ops import Kernels
from tell.kernels.packed_attention import RowAttention
from tell.kernels.products import Products
from tell.models.find import find_model
from tell.models.load import load_model
from tell.train.lora import add_lora
from tell.train.packing import TrainRow
from tell.train.step import Body, StepRules, step_loss

WARMUP = 2  # steps before the clock counts
KERNELS = {
    "softmax": "softmax",
    "pack": "rows packed for attention and back",
    "unpack": "rows packed for attention and back",
    "gather_prefix": "rows packed for attention and back",
    "add_prefix": "rows packed for attention and back",
    "gated": "gated activation",
    "rmsnorm": "norms",
    "cross_entropy": "cross-entropy",
}
# Operands of each product: left one, then right one.
PRODUCTS = (
    (torch.nn.functional, "linear", (0, 1)),
    (torch, "mm", (0, 1)),
    (torch, "bmm", (0, 1)),
    (torch.Tensor, "__matmul__", (0, 1)),
    (torch, "addmm", (1, 2)),
    (torch.Tensor, "addmm_", (1, 2)),
    (torch.Tensor, "baddbmm_", (1, 2)),
)
Describe = Callable[..., tuple[str, int]]  # (result, *arguments of a call) -> what it is, its FLOPs


@dataclass(slots=True)
class Clock:
    """Seconds, calls and FLOPs by what they were spent on; calls inside a timed call count to the outer one."""

    seconds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    inside: bool = False

    def wrap(self, stack: ExitStack, owner: Any, name: str, describe: Describe) -> None:
        """Time every call of ``owner.name`` until the stack is closed."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return original(*args, **kwargs)
            self.inside, begin = True, time.perf_counter()
            try:
                out = original(*args, **kwargs)
            finally:
                self.inside = False
            seconds = time.perf_counter() - begin
            key, flops = describe(out, *args)
            self.seconds[key] += seconds
            self.calls[key] += 1
            self.flops[key] += flops
            return out

        setattr(owner, name, timed)
        stack.callback(setattr, owner, name, original)

    def clear(self) -> None:
        for counter in (self.seconds, self.calls, self.flops):
            counter.clear()


def watch(clock: Clock, stack: ExitStack, vocabulary: int, rank: int) -> None:
    """Time every product and kernel of a training step.

    Args:
        vocabulary: rows of the output layer.
        rank: of an adapter.
    """
    for owner, name, operands in PRODUCTS:
        clock.wrap(stack, owner, name, _product(operands, vocabulary, rank))
    clock.wrap(stack, Products, "forward", lambda _, __, x, w, bias=None, a=None, b=None, *___: _layer(x, w, a, b))
    clock.wrap(stack, Products, "backward", lambda _, __, gy, w, b=None, a=None, *___: _layer(gy, w, b, a))
    clock.wrap(stack, Products, "outer", lambda out, _, g, x, *__: ("products: adapters", 2 * g.numel() * x.shape[1]))
    for name in ("forward", "backward"):
        clock.wrap(stack, RowAttention, name, lambda *_: ("kernels: attention", 0))
    for name in [name for name in vars(Kernels) if not name.startswith("_")]:
        label = f"kernels: {KERNELS.get(name.removesuffix('_back'), name)}"
        clock.wrap(stack, Kernels, name, lambda *_, label=label: (label, 0))


def _product(operands: tuple[int, int], vocabulary: int, rank: int) -> Describe:
    def describe(out: Tensor, *args: Tensor) -> tuple[str, int]:
        left, right = (args[i] for i in operands)
        flops = 2 * out.numel() * left.shape[-1]
        if right.dim() > 2:
            return "products: attention", flops
        if vocabulary in (*left.shape, *right.shape):
            return "products: output layer", flops
        narrow = min(left.numel() // left.shape[-1], left.shape[-1], out.shape[-1]) <= 3 * rank
        return "products: adapters" if narrow else "products: layers", flops

    return describe


def _layer(x: Tensor, *factors: Tensor | None) -> tuple[str, int]:
    return "products: layers and adapters", 2 * len(x) * sum(m.numel() for m in factors if m is not None)


@dataclass(frozen=True, slots=True)
class Profile:
    """What `measure` found: the clock, and totals of the timed steps.

    Attributes:
        steps, tokens: optimiser steps, and their real tokens.
        seconds, system: wall time, and the processor time that the system took of it.
        faults: page faults that read nothing from disk.
    """

    clock: Clock
    steps: int
    tokens: int
    seconds: float
    system: float
    faults: int


def measure(options: argparse.Namespace) -> Profile:
    """Train some steps on the rows of the benchmark; arguments as in `parse`."""
    files = find_model(options.model)
    model = load_model(files, device="cpu").model
    config = TrainConfig(lora_dropout=0.0)
    if options.keep_memory:
        keep_memory()
    tuned = add_lora(model, config, seed=options.seed)
    body = Body(tuned)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    count = (WARMUP + options.steps) * options.batch
    rows = make_rows(count, plain_tokens(files.path), options.seed, options.length_scale)

    def train(steps: range) -> int:
        tokens = 0
        for step in steps:
            chosen = train_rows(rows, range(step * options.batch, (step + 1) * options.batch))
            out = step_loss(body, chosen, StepRules("example", micro_tokens=options.micro_tokens, share_prefix=True))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += out.tokens
        return tokens

    clock = Clock()
    with ExitStack() as stack:
        watch(clock, stack, body.head.shape[0], config.lora_r)
        train(range(WARMUP))
        clock.clear()
        before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        tokens = train(range(WARMUP, WARMUP + options.steps))
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    system, faults = after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt
    return Profile(clock, options.steps, tokens, seconds, system, faults)


def train_rows(rows: Rows, numbers: Iterable[int]) -> list[TrainRow]:
    """Some of the rows as `step_loss` takes them."""
    found = []
    for i in numbers:
        ids, prompt = rows.row(i)
        task = bool(rows.task[i])
        found.append(TrainRow(ids, np.arange(len(ids)) >= prompt, int(task), task))
    return found


def show(profile: Profile, console: Console) -> None:
    """Print a profile as a table, per step."""
    clock, steps, total = profile.clock, profile.steps, profile.seconds
    speed = f"{profile.tokens / total:,.0f} real tokens/s"
    table = Table(title=f"{speed}, {profile.tokens / steps:,.0f} tokens and {1e3 * total / steps:,.0f} ms a step")
    for column in ("what", "ms a step", "share", "calls a step", "GFLOP/s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for key, seconds in clock.seconds.most_common():
        calls, flops = f"{clock.calls[key] / steps:,.0f}", clock.flops[key]
        rate = f"{flops / seconds / 1e9:,.0f}" if flops else ""
        table.add_row(key, f"{1e3 * seconds / steps:,.1f}", f"{seconds / total:.1%}", calls, rate)
    rest = total - sum(clock.seconds.values())
    table.add_row("everything else", f"{1e3 * rest / steps:,.1f}", f"{rest / total:.1%}")
    console.print(table)
    console.print(f"page faults {profile.faults / steps:,.0f} and system time {profile.system / steps:.2f} s a step")


def compile_seconds() -> float:
    """Seconds that the kernels take to compile into an empty ``$TELL_HOME``; once a process.

    Raises:
        TellError: they cannot be had here.
    """
    with tempfile.TemporaryDirectory() as home:
        os.environ["TELL_HOME"] = home
        begin = time.perf_counter()
        if library() is None:
            raise TellError(f"no kernels: {reason()}", where="--compile", remedy="Install gcc or clang.")
        return time.perf_counter() - begin


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="folder, hub name or smollm2-135m")
    parser.add_argument("--steps", type=int, default=8, help=f"optimiser steps that are timed, after {WARMUP} others")
    parser.add_argument("--batch", type=int, default=TrainConfig().batch_size, help="rows of a step")
    parser.add_argument("--micro-tokens", type=int, default=TrainConfig().micro_tokens, help="tokens of a pass")
    parser.add_argument("--length-scale", type=float, default=1.0, help="shrinks all lengths")
    parser.add_argument("--seed", type=int, default=42, help="of rows and adapters")
    parser.add_argument(
        "--no-keep-memory", dest="keep_memory", action="store_false", help="give freed memory back to the system"
    )
    parser.add_argument("--compile", action="store_true", help="print how long the kernels take to compile, no more")
    options = parser.parse_args(arguments)
    require_positive(vars(options), ("steps", "batch", "micro_tokens"))
    return options


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        if options.compile:
            print(f"kernels compiled in {compile_seconds():.1f} s")
        else:
            show(measure(options), Console())
    except TellError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
