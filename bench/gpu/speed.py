"""Stages that measure: training and decoding next to transformers, waits for the GPU, where a step's time goes."""

from __future__ import annotations

import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch

from bench.gpu.run import Run, make_model, rows_for, train_rows
from tell.train.packing import TrainRow

WARM, STEPS = 3, 8


class Tell:
    """TELL's training step."""

    def __init__(self, size: str, run: Run) -> None:
        from tell.config_sections import TrainConfig
        from tell.train.lora import add_lora
        from tell.train.step import Body

        self.model = make_model(size, run.device, torch.bfloat16)
        tuned = add_lora(self.model, TrainConfig(lora_dropout=0.0), seed=1)
        self.run, self.body = run, Body(tuned)
        self.parameters = [p for p in tuned.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.01, fused=True)

    def step(self, rows: list[TrainRow]) -> float:
        from tell.train.step import StepRules, step_loss

        rules = StepRules(micro_tokens=self.run.micro, share_prefix=True)
        clip = lambda: torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)  # noqa: E731
        out = step_loss(self.body, rows, rules, clip=clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return out.loss


class Peer:
    """transformers and peft as Trainer runs them: padded micro-batches of rows sorted by length, sdpa."""

    def __init__(self, size: str, run: Run, *, micro_rows: int, liger: bool = False, checkpointing: bool = False):
        from peft import LoraConfig, get_peft_model

        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen3

            (apply_liger_kernel_to_qwen3 if size.startswith("qwen3") else apply_liger_kernel_to_llama)()
        model = make_model(size, run.device, torch.bfloat16)
        model.config.use_cache = False
        lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
        self.model = get_peft_model(model, lora).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.01, fused=True)
        self.run, self.micro_rows = run, micro_rows

    def step(self, rows: list[TrainRow]) -> float:
        rows = sorted(rows, key=lambda r: -len(r.ids))
        count, losses = sum(int(r.mask.sum()) for r in rows), []
        for at in range(0, len(rows), self.micro_rows):
            part = rows[at : at + self.micro_rows]
            shape = len(part), len(part[0].ids)
            ids, seen, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100)
            for i, r in enumerate(part):
                n = len(r.ids)
                ids[i, :n], seen[i, :n], labels[i, :n] = r.ids, 1, np.where(r.mask, r.ids, -100)
            x, m, y = (torch.from_numpy(z).to(self.run.device, non_blocking=True) for z in (ids, seen, labels))
            loss = self.model(input_ids=x, attention_mask=m, labels=y, num_items_in_batch=count).loss
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(sum(losses))


def train(run: Run) -> dict[str, Any]:
    """Real tokens a second on the same rows; TELL takes Liger's kernels where they are installed."""
    variants: dict[str, Callable[[str], Any]] = {
        "tell": lambda size: Tell(size, run),
        "peft, padded x4": lambda size: Peer(size, run, micro_rows=4),
        "peft, padded x16": lambda size: Peer(size, run, micro_rows=16),
        "peft, padded x4, checkpointing": lambda size: Peer(size, run, micro_rows=4, checkpointing=True),
    }
    return _compare(run, "train", variants)


def liger(run: Run) -> dict[str, Any]:
    """Peers with Liger's patch."""
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        run.find("liger", "liger-kernel is not installed")
        return {}
    return _compare(
        run,
        "liger",
        {f"peft and liger, padded x{n}": lambda s, n=n: Peer(s, run, micro_rows=n, liger=True) for n in (4, 16)},
    )


def _compare(run: Run, stage: str, variants: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    out = run.stages.setdefault(stage, {})
    for name, make in variants.items():  # TELL at every size first, in case time runs out
        for size, batch in product(run.sizes, run.batches):
            key = f"{size}, {batch} rows: {name}"
            if run.late(key, 45 if size == "llama3-8b" else 20):
                continue
            rows = train_rows(rows_for(size, batch * (WARM + STEPS), run.scale))
            try:
                out[key] = _measure(run, lambda make=make, size=size: make(size), rows, batch)
                run.find(key, out[key])
            except Exception as error:  # out of memory, most likely: the next variant may fit
                traceback.print_exc()
                out[key] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
                run.find(key, out[key]["error"], good=not name.startswith("tell"))
            run.clear()
            run.save()
    return out


def _measure(run: Run, make: Callable[[], Any], rows: list[TrainRow], batch: int) -> dict[str, Any]:
    run.clear()
    runner = make()
    parts = [rows[at : at + batch] for at in range(0, len(rows), batch)]
    run.sync()
    begin = time.perf_counter()
    runner.step(parts[0])
    run.sync()
    first = time.perf_counter() - begin
    waits = waits_of(run, lambda: runner.step(parts[1]))
    for part in parts[2:WARM]:
        runner.step(part)
    run.sync()
    times, loss = [], 0.0
    for part in parts[WARM:]:
        begin = time.perf_counter()
        loss = runner.step(part)
        run.sync()
        times.append(time.perf_counter() - begin)
    from tell.train.fast.fused import fused_counts

    tokens = sum(len(row.ids) for part in parts[WARM:] for row in part)
    speed = tokens / sum(times)
    tflops = speed * flops_a_token(runner.model, rows) / 1e12
    ceiling = run.stages.get("facts", {}).get("matmul_tflops")
    return {
        "tokens_s": round(speed), "ms_step": round(1e3 * statistics.median(times), 1), "tokens_step": tokens // STEPS,
        "tflops": round(tflops, 2), "of_ceiling": round(tflops / ceiling, 4) if ceiling else None,
        "peak_gb": run.peak_gb(), "waits_a_step": waits, "first_step_s": round(first, 2), "loss": round(loss, 4),
        "exchanged": fused_counts(runner.model),
    }  # fmt: skip


def flops_a_token(model: Any, rows: list[TrainRow]) -> float:
    """4 for each linear parameter, and of the output layer where a token is trained: LoRA without recomputation."""
    head = model.get_output_embeddings().weight.numel()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)) - head
    share = sum(int(r.mask.sum()) for r in rows) / sum(len(r.ids) for r in rows)
    return 4.0 * linear + 4.0 * head * share


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
    from tell.decode.engine import Engine
    from tell.decode.sampler import Decoding

    out: dict[str, Any] = {}
    for size in run.sizes:
        if run.late(f"decode {size}", 40):
            continue
        model = make_model(size, run.device, torch.bfloat16)
        rng = np.random.default_rng(1)
        n, new, ahead = (4, 8, 30) if run.tiny else (64, 64, 300)
        head = rng.integers(5, 500, ahead).tolist()
        prompts = [head + rng.integers(5, 500, 60).tolist() for _ in range(n)]
        engine = Engine(model, device=run.device, max_positions=8192)
        decoding = Decoding(max_new_tokens=new, stop_ids=(), greedy=True, repetition_penalty=1.0, batch_size=n)

        def ours(limit: int, engine: Any = engine, prompts: Any = prompts, decoding: Any = decoding) -> Any:
            return engine.generate(prompts, decoding, limits=[limit] * len(prompts))

        ours(4)
        seconds, answers = _timed(run, lambda ours=ours, new=new: ours(new))
        start, _ = _timed(run, lambda ours=ours: ours(1))  # the shared prefix and prefill
        waits = [waits_of(run, lambda ours=ours, k=k: ours(k)) for k in (2, new)]
        more = None if waits[0] is None else round((waits[1] - waits[0]) / (new - 2), 2)
        facts: dict[str, Any] = {
            "tokens_s": round(n * new / seconds), "ms_prefill": round(1e3 * start, 1),
            "ms_token_step": round(1e3 * (seconds - start) / (new - 1), 2), "waits_a_token": more,
        }  # fmt: skip
        run.find(f"decode {size}, tell", facts, good=more is None or more <= 1)
        out[f"{size} tell"] = facts
        theirs = _transformers(run, model, prompts, new)
        facts = {"tokens_s": round(n * new / theirs[0])}
        same = [a.ids[:16] == b[len(p) : len(p) + 16] for a, b, p in zip(answers, theirs[1], prompts, strict=True)]
        facts["first_16_tokens_equal"] = float(np.mean(same))
        run.find(f"decode {size}, transformers", facts)
        out[f"{size} transformers"] = facts
        del model, engine, ours
        run.clear()
        run.save()
    return out


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


def profile(run: Run) -> dict[str, Any]:
    """How busy the GPU is in a training step, its launches and its heaviest kernels."""
    if run.device != "cuda":
        return {}
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    out = {}
    for size in run.sizes:
        if run.late(f"profile {size}", 30):
            continue
        rows, runner = train_rows(rows_for(size, 16 * 5, run.scale)), Tell(size, run)
        parts = [rows[at : at + 16] for at in range(0, len(rows), 16)]
        for part in parts[:3]:
            runner.step(part)
        run.sync()
        with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            wall, _ = _timed(run, lambda runner=runner, parts=parts: [runner.step(part) for part in parts[3:]])
        events = seen.key_averages()
        launches = sum(e.count for e in events if e.key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))) / 2
        # kernels alone: an operator's entry repeats what its kernels took
        busy = sum(e.self_device_time_total for e in events if e.device_type == torch.autograd.DeviceType.CUDA) / 1e6
        table = events.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=70)
        (run.out / f"profile-{size}.txt").write_text(table, encoding="utf-8")
        out[size] = {"busy": round(busy / wall, 3), "launches_a_step": launches, "ms_step": round(wall / 2 * 1e3, 1)}
        run.find(f"profile {size}", out[size])
        del runner, seen, events
        run.clear()
    return out
