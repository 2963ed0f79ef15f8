"""Stages that measure: decoding next to transformers, waits for the GPU, where a step's time goes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench.gpu import runners
from bench.gpu.run import Run, make_model, now, rows_for
from bench.gpu.training import least_seconds, plan_for, small_first

if TYPE_CHECKING:
    from tell.decode.engine import Engine
    from tell.decode.sampler import Decoding

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
    """New tokens a second, greedy: TELL's engine, as it serves, and transformers' generate, 64 rows behind 300 shared
    tokens.
    """
    out = run.stages.setdefault("decode", {})
    for size in small_first(run.sizes):
        if f"{size} tell" in out or run.late(f"decode {size}", least_seconds(size)):
            continue
        try:
            _decode(run, size, out)
        except Exception as error:
            run.failed(out, f"{size} tell", error)
        run.clear()
        run.save()
    return out


def requests(run: Run) -> tuple[list[list[int]], Decoding]:
    """Prompts with a shared head, and how each is answered: greedily, to the limit."""
    from tell.decode.sampler import Decoding

    rng = np.random.default_rng(1)
    n, new, ahead = (4, 8, 30) if run.tiny else (64, 64, 300)
    head = rng.integers(5, 500, ahead).tolist()
    prompts = [head + rng.integers(5, 500, 60).tolist() for _ in range(n)]
    return prompts, Decoding(max_new_tokens=new, stop_ids=(), greedy=True, repetition_penalty=1.0, batch_size=n)


def decoded(run: Run, engine: Engine) -> tuple[dict[str, Any], list[Any]]:
    """Speed of the second time, the first, which joins weights and captures graphs, apart; and the answers."""
    prompts, decoding = requests(run)
    with engine.fixed_weights():
        first, _ = _timed(run, lambda: engine.generate(prompts, decoding))
        seconds, answers = _timed(run, lambda: engine.generate(prompts, decoding))
    tokens = sum(len(answer.ids) for answer in answers)
    facts = {"tokens_s": round(tokens / seconds), "seconds": round(seconds, 4), "first_s": round(first, 2)}
    return {**facts, "how": engine.how}, answers


def _decode(run: Run, size: str, out: dict[str, Any]) -> None:
    from tell.decode.engine import Engine

    model = make_model(size, run.device, torch.bfloat16)
    prompts, decoding = requests(run)
    n, new = len(prompts), decoding.max_new_tokens
    engine = Engine(model, device=run.device, max_positions=8192)

    def ours(limit: int) -> Any:
        return engine.generate(prompts, decoding, limits=[limit] * len(prompts))

    told, answers = decoded(run, engine)
    waits: list[int | None] = []
    with engine.fixed_weights():
        ours(1)
        start, _ = _timed(run, lambda: ours(1))  # prefill
        for limit in (2, new):
            ours(limit)  # what a call of this length captures
            waits.append(waits_of(run, partial(ours, limit)))
    more = None if waits[0] is None or waits[1] is None else round((waits[1] - waits[0]) / (new - 2), 2)
    facts: dict[str, Any] = {
        **told, "ms_prefill": round(1e3 * start, 1), "waits_a_token": more,
        "ms_token_step": round(1e3 * (told["seconds"] - start) / (new - 1), 2),
    }  # fmt: skip
    out[f"{size} tell"] = facts
    run.find(f"decode {size}, tell", facts, good=more is None or more <= 1)
    run.save()
    if run.late(f"decode {size}, transformers", least_seconds(size)):
        return
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
    begin = now()
    got = call()
    run.sync()
    return now() - begin, got


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
            self.seconds -= now()
        elif len(timed.ends) == self.last:
            self.run.sync()
            self.seconds += now()
            self.close()

    def close(self) -> None:
        """Stop profiling, where a training failed within the window too: the next could not begin."""
        if self.open:
            self.open = False
            self.profiler.stop()


def profile(run: Run) -> dict[str, Any]:
    """How busy the GPU is in a training step, its launches and its heaviest kernels; first of the big model."""
    if run.device != "cuda":
        return {}
    out = run.stages.setdefault("profile", {})
    for size in reversed(small_first(run.sizes)):
        if size in out or run.late(f"profile {size}", least_seconds(size)):
            continue
        try:
            out[size] = _profile(run, size)
            run.find(f"profile {size}", out[size])
        except Exception as error:
            run.failed(out, size, error)
        run.clear()
        run.save()
    return out


def _kernel_time(event: Any) -> float:
    """Microseconds; a range that somebody named (an optimiser's step) repeats what its kernels took."""
    own = event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    return float(event.self_device_time_total) if own else 0.0


def _profile(run: Run, size: str) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    plan = replace(plan_for(run, size, graphs=True), timed=6, seconds=float("inf"))
    rows = rows_for(size, plan.rows, run.scale)
    model = make_model(size, run.device, torch.bfloat16)
    seen = record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    window = Window(run, seen, plan.warm, plan.warm + plan.timed)
    try:
        timed = runners.tell(run, model, rows, plan, {"micro_tokens": run.micro}, watch=window)
    finally:
        window.close()
    if not timed.whole:
        raise ValueError(f"no time left after {len(timed.ends)} steps")
    events, wall = seen.key_averages(), window.seconds
    done = (int(rows.lengths.sum()) - window.moved) / (float(rows.lengths.mean()) * run.batch)  # steps
    launches = sum(e.count for e in events if e.key.startswith(LAUNCHES)) / done
    # kernels alone: an operator's entry repeats what its kernels took
    busy = sum(map(_kernel_time, seen.events() or ())) / 1e6
    table = events.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=70)
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / f"profile-{size}.txt").write_text(table, encoding="utf-8")
    step = round(1e3 * wall / done, 1)
    return {"busy": round(busy / wall, 3), "launches_a_step": round(launches), "ms_step": step}
