"""``python -m bench.profile``: where the time of tell's training step goes, on the rows of the benchmark.

Matrix products and kernels are timed one by one from outside; what is left over is Python, dispatch, copies, page
faults and the optimiser. Only meaningful on a processor, where a call returns when its work is done.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.rows import make_rows, plain_tokens
from tell.config import TrainConfig
from tell.kernels import keep_memory
from tell.kernels import ops as kernel_ops
from tell.models.find import find_model
from tell.models.load import load_model
from tell.train.batches import TrainRow
from tell.train.lora import add_lora
from tell.train.step import Body, step_loss

KERNELS = {
    "softmax": ("softmax", "softmax_back"),
    "rows packed for attention and back": ("pack", "unpack", "gather_prefix", "add_prefix"),
    "gated activation": ("gated", "gated_back"),
    "norms": ("rmsnorm", "rmsnorm_back"),
    "cross-entropy": ("cross_entropy",),
}


class Clock:
    """Seconds and calls by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def wrap(self, owner: Any, name: str, label: Callable[..., str] | str) -> None:
        """Time every call of ``owner.name``; ``label`` may look at its arguments."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            out = original(*args, **kwargs)
            key = label if isinstance(label, str) else label(*args)
            self.seconds[key] += time.perf_counter() - begin
            self.calls[key] += 1
            return out

        setattr(owner, name, timed)

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()


def _product(vocabulary: int, rank: int) -> Callable[..., str]:
    def label(a: torch.Tensor, b: torch.Tensor, *_: Any) -> str:
        if vocabulary in b.shape or vocabulary in a.shape:
            return "products: output layer"
        narrow = min(*a.shape, *b.shape) <= 3 * rank
        return "products: adapters" if narrow else "products: layers"

    return label


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro-tokens", type=int, default=TrainConfig().micro_tokens)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()

    files = find_model(options.model)
    model = load_model(files, device="cpu").model
    config = TrainConfig(lora_dropout=0.0)
    keep_memory()
    tuned = add_lora(model, config, seed=options.seed)
    body = Body(tuned)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    rows = make_rows((options.steps + 2) * 16, plain_tokens(files.path), options.seed)

    def step(at: int) -> int:
        chosen = []
        for i in range(16 * at, 16 * at + 16):
            ids, prompt = rows.row(i)
            mask = torch.arange(len(ids)).numpy() >= prompt
            chosen.append(TrainRow(ids, mask, int(rows.task[i]), bool(rows.task[i])))
        out = step_loss(body, chosen, normalization="example", micro_tokens=options.micro_tokens, share_prefix=True)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.tokens

    clock = Clock()
    for group, names in KERNELS.items():
        for name in names:
            clock.wrap(kernel_ops.Kernels, name, f"kernels: {group}")
    product = _product(body.head.shape[0], config.lora_r)
    clock.wrap(torch.nn.functional, "linear", product)
    clock.wrap(torch, "mm", product)
    clock.wrap(torch.Tensor, "__matmul__", product)
    clock.wrap(torch.Tensor, "addmm_", "products: adapters")
    clock.wrap(torch, "bmm", "products: attention")
    for at in range(2):
        step(at)
    clock.clear()
    begin, tokens = time.perf_counter(), 0
    for at in range(2, 2 + options.steps):
        tokens += step(at)
    total = time.perf_counter() - begin

    table = Table(title=f"{tokens / total:,.0f} real tokens/s, {1e3 * total / options.steps:,.0f} ms a step")
    for column in ("what", "ms a step", "share", "calls a step"):
        table.add_column(column, justify="left" if column == "what" else "right")
    rest = total - sum(clock.seconds.values())
    for key, seconds in clock.seconds.most_common():
        calls = f"{clock.calls[key] / options.steps:,.0f}"
        table.add_row(key, f"{1e3 * seconds / options.steps:,.1f}", f"{seconds / total:.1%}", calls)
    table.add_row("everything else", f"{1e3 * rest / options.steps:,.1f}", f"{rest / total:.1%}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
