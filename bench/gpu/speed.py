"""Stages that measure: decoding next to transformers, waits for the GPU, where a step's time goes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.gpu import runners
from bench.gpu.run import Run, make_model, rows_for
from bench.gpu.training import MANY, STEPS

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")


def waits_of(run: Run, call: Callable[[], Any]) -> int | None:
    """How often ``call`` waits for the GPU, by torch's own count."""
    if run.device != "cuda":
        call()
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def decode(run: Run) -> dict[str, Any]:
    """New tokens a second, greedy: TELL's engine and transformers' generate, 64 rows behind 300 shared tokens."""
    out = run.stages.setdefault("decode", {})
    for size in run.sizes:
        if run.late(f"decode {size}", 40):
            continue
        try:
            _decode(run, size, out)
        except Exception as error:
            run.failed(out, f"{size} tell", error)
        run.clear()
        run.save()
    return out


def _decode(run: Run, size: str, out: dict[str, Any]) -> None:
    from tell.decode.engine import Engine
    from tell.decode.sampler import Decoding

    model = make_model(size, run.device, torch.bfloat16)
    rng = np.random.default_rng(1)
    n, new, ahead = (4, 8, 30) if run.tiny else (64, 64, 300)
    head = rng.integers(5, 500, ahead).tolist()
    prompts = [head + rng.integers(5, 500, 60).tolist() for _ in range(n)]
    engine = Engine(model, device=run.device, max_positions=8192)
    decoding = Decoding(max_new_tokens=new, stop_ids=(), greedy=True, repetition_penalty=1.0, batch_size=n)

    def ours(limit: int) -> Any:
        return engine.generate(prompts, decoding, limits=[limit] * len(prompts))

    ours(4)
    seconds, answers = _timed(run, lambda: ours(new))
    start, _ = _timed(run, lambda: ours(1))  # the shared prefix and prefill
    waits = [waits_of(run, partial(ours, k)) for k in (2, new)]
    more = None if waits[0] is None or waits[1] is None else round((waits[1] - waits[0]) / (new - 2), 2)
    facts: dict[str, Any] = {
        "tokens_s": round(n * new / seconds), "ms_prefill": round(1e3 * start, 1),
        "ms_token_step": round(1e3 * (seconds - start) / (new - 1), 2), "waits_a_token": more,
    }  # fmt: skip
    out[f"{size} tell"] = facts
    run.find(f"decode {size}, tell", facts, good=more is None or more <= 1)
    run.save()
    try:
        theirs, tokens = _transformers(run, model, prompts, new)
    except Exception as error:
        run.failed(out, f"{size} transformers", error, good=True)
        return
    same = [a.ids[:16] == b[len(p) : len(p) + 16] for a, b, p in zip(answers, tokens, prompts, strict=True)]
    out[f"{size} transformers"] = {"tokens_s": round(n * new / theirs), "first_16_tokens_equal": float(np.mean(same))}
    run.find(f"decode {size}, transformers", out[f"{size} transformers"])


def _timed(run: Run, call: Callable[[], Any]) -> tuple[float, Any]:
    run.sync()
    begin = time.perf_counter()
    got = call()
    run.sync()
    return time.perf_counter() - begin, got


@torch.inference_mode()
def _transformers(run: Run, model: Any, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
    from tell.train.attention import restore
    from tell.train.fast.fused import unfuse_modules

    unfuse_modules(model)
    restore(model)
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts, device=run.device)

    def generate(tokens: int) -> Any:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
            pad_token_id=0,
        )  # fmt: skip

    generate(4)
    seconds, got = _timed(run, lambda: generate(new))
    return seconds, got.tolist()


class Window:
    """Profiles from the end of one step to the end of another.

    Attributes:
        seconds: between them.
        moved: tokens that were launched before; the next step may be on its way when one is reported.
    """

    def __init__(self, run: Run, profiler: Any, first: int, last: int) -> None:
        self.run, self.profiler, self.first, self.last = run, profiler, first, last
        self.seconds, self.moved, self.open = 0.0, 0, False

    def __call__(self, timed: runners.Timed) -> None:
        if len(timed.ends) == self.first:
            self.run.sync()
            self.moved = timed.moved
            self.profiler.start()
            self.open = True
            self.seconds -= time.perf_counter()
        elif len(timed.ends) == self.last:
            self.run.sync()
            self.seconds += time.perf_counter()
            self.close()

    def close(self) -> None:
        """Stop profiling, where a training failed within the window too: the next could not begin."""
        if self.open:
            self.open = False
            self.profiler.stop()


def profile(run: Run) -> dict[str, Any]:
    """How busy the GPU is in a training step, its launches and its heaviest kernels."""
    if run.device != "cuda":
        return {}
    out = run.stages.setdefault("profile", {})
    for size in run.sizes:
        if run.late(f"profile {size}", 40):
            continue
        try:
            out[size] = _profile(run, size)
            run.find(f"profile {size}", out[size])
        except Exception as error:
            run.failed(out, size, error)
        run.clear()
        run.save()
    return out


def _profile(run: Run, size: str) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    warm, steps = STEPS.get(size, MANY)[0], 6
    rows = rows_for(size, run.batch * (warm + steps), run.scale)
    model = make_model(size, run.device, torch.bfloat16)
    seen = record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    window = Window(run, seen, warm, warm + steps)
    try:
        runners.tell(run, model, rows, run.batch, {"micro_tokens": run.micro}, watch=window)
    finally:
        window.close()
    events, wall = seen.key_averages(), window.seconds
    done = (int(rows.lengths.sum()) - window.moved) / (float(rows.lengths.mean()) * run.batch)  # steps
    launches = sum(e.count for e in events if e.key.startswith(LAUNCHES)) / done
    # kernels alone: an operator's entry repeats what its kernels took
    busy = sum(e.self_device_time_total for e in events if e.device_type == torch.autograd.DeviceType.CUDA) / 1e6
    table = events.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=70)
    (run.out / f"profile-{size}.txt").write_text(table, encoding="utf-8")
    step = round(1e3 * wall / done, 1)
    return {"busy": round(busy / wall, 3), "launches_a_step": round(launches), "ms_step": step}
