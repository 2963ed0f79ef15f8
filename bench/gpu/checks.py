"""Stages that check: what is installed, attention, resuming, losses against the CPU, merging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.gpu.run import Run, make_model, rows_for, train_rows

PACKAGES = ("triton", "transformers", "peft", "accelerate", "trl", "liger-kernel", "flash-attn", "vllm", "numpy")


def facts(run: Run) -> dict[str, Any]:
    """Versions, the card, and its ceilings in matrix products and copies."""
    out: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = None
    if run.device == "cuda":
        from tell.models.machine import gpu

        card = torch.cuda.get_device_properties(0)
        x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        a, b = (torch.empty(2**31, dtype=torch.uint8, device="cuda") for _ in range(2))
        out |= {
            "gpu": card.name,
            "nvidia-smi": gpu(),
            "memory_gib": round(card.total_memory / 2**30, 1),
            "matmul_tflops": round(2 * 8192**3 / _seconds(lambda: x @ y) / 1e12, 1),
            "copy_tb_s": round(2 * 2**31 / _seconds(lambda: b.copy_(a)) / 1e12, 2),
        }
        run.find("the card as planned for", out["nvidia-smi"], good=out["nvidia-smi"][0] == card.name)
    run.find("facts", out)
    return out


def _seconds(call: Any, times: int = 10) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times


def attention(run: Run) -> dict[str, Any]:
    """Which attention serves, and its output and gradients for grouped heads against fp64."""
    from tell.train.attention import PackedPlan, Rule
    from tell.train.fast.cuda import attention_note, liger_forwards, packed_plan

    model = make_model("tiny", run.device, torch.bfloat16)
    out: dict[str, Any] = {"note": attention_note(model), "liger": liger_forwards() is not None}
    run.find("attention", out["note"], good=run.device == "cpu" or "flash" in out["note"])
    run.find("liger-kernel", out["liger"])
    for heads, kv, width in ((9, 3, 64), (32, 8, 128), (16, 8, 128)):
        for prefix, window in ((0, None), (40, None), (40, 50)):
            lengths = [37, 130, 5, 260]
            total, rule = prefix + sum(lengths), Rule(0.1, window, None)
            generator = torch.Generator().manual_seed(0)
            exact = [torch.randn(1, n, total, width, generator=generator) for n in (heads, kv, kv)]
            exact = [x.bfloat16().double() for x in exact]
            slope = torch.randn(1, total, heads, width, generator=generator).bfloat16().double()
            results = []
            for plan, dtype in (
                (packed_plan(lengths, prefix=prefix, device=run.device), torch.bfloat16),
                (PackedPlan(lengths, prefix=prefix, device=run.device), torch.float64),
            ):
                leaves = [x.to(run.device, dtype).requires_grad_() for x in exact]
                got = plan.attend(None, *leaves, rule)
                results.append([got.detach(), *torch.autograd.grad(got, leaves, slope.to(run.device, dtype))])
            errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(*results, strict=True)]
            name = f"heads {heads}/{kv} x {width}, prefix {prefix}, window {window}"
            out[name] = [round(error, 5) for error in errors]
            run.find(f"{name}: errors of out, dq, dk, dv", out[name], good=max(errors) <= 1e-2)
    return out


def resume(run: Run) -> dict[str, Any]:
    """A run that is stopped and resumed against one that is not; in its own process, for a fault would end this one."""
    code = "import json, sys; from bench.gpu.checks import resumed; print(json.dumps(resumed(sys.argv[1])))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), *sys.path]))}
    done = subprocess.run(
        [sys.executable, "-c", code, run.device], capture_output=True, text=True, timeout=180, env=environment
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        run.find("resume", lines[-1], good=False)
        return {"error": lines[-5:]}
    out = json.loads(done.stdout.strip().splitlines()[-1])
    run.find("resumed adapter, fp32", out["float32"], good=out["float32"]["cosine"] > 0.999999)
    run.find("resumed adapter, bf16", out["bfloat16"], good=out["bfloat16"]["cosine"] > 0.9999)
    return out


def resumed(device: str) -> dict[str, Any]:
    """Per number format: how far the adapter of a resumed run is from that of a straight one."""
    from safetensors.torch import load_file

    from bench.engines.train_tell import _mixture
    from tell.config_sections import TrainConfig
    from tell.errors import Interrupted
    from tell.train.trainer import Trainer
    from tell.train.training_job import TrainingHooks, TrainingJob

    rows, out = rows_for("tiny", 48, 0.2), {}
    mixture = _mixture(rows, torch.randperm(48, generator=torch.Generator().manual_seed(1)).numpy())
    config = TrainConfig(batch_size=8, learning_rate=1e-2, checkpoint_every=0)
    for dtype in (torch.float32, torch.bfloat16):
        model, adapters = make_model("tiny", device, dtype), []
        with tempfile.TemporaryDirectory() as folder:
            for name, stop_after in (("straight", 0), ("resumed", 3)):
                asked: list[int] = []

                def stopped(stop_after: int = stop_after, asked: list[int] = asked) -> bool:
                    asked.append(1)
                    return len(asked) == stop_after

                place = Path(folder) / name
                job = TrainingJob(mixture.tables, mixture, config, 1, place, place / "log.jsonl")
                trainer = Trainer(model, job, device=device, hooks=TrainingHooks(stopped=stopped))
                try:
                    trainer.run()
                except Interrupted:
                    trainer.run(resume=True)
                tensors = load_file(str(place / "adapter_model.safetensors"))
                adapters.append(torch.cat([tensors[key].flatten().double() for key in sorted(tensors)]))
        one, two = adapters
        cosine = float(torch.nn.functional.cosine_similarity(one, two, dim=0))
        out[str(dtype).removeprefix("torch.")] = {"equal": torch.equal(one, two), "cosine": cosine}
    return out


def equal(run: Run) -> dict[str, Any]:
    """Losses and the adapter of eight steps: the device in fp32, bf16 and plain bf16 against a CPU in fp32."""
    size, steps = ("tiny", 3) if run.tiny else ("smollm2-135m", 8)
    rows = train_rows(rows_for(size, 16 * steps, 0.2 if run.tiny else 0.5))
    base = make_model(size, "cpu", torch.float32)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    expected, norms, adapter = _losses(base, rows, "cpu", steps)
    out: dict[str, Any] = {"cpu float32": [round(x, 5) for x in expected]}
    for dtype, fast in ((torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "off")):
        model = make_model(size, run.device, dtype)
        model.load_state_dict(state)
        got, got_norms, got_adapter = _losses(model, rows, run.device, steps, fast)
        name = f"{run.device} {str(dtype).removeprefix('torch.')} fast={fast}"
        out[name] = {
            "losses": [round(x, 5) for x in got],
            "loss_gap": max(abs(x / y - 1) for x, y in zip(got, expected, strict=True)),
            "norm_gap": max(abs(x / y - 1) for x, y in zip(got_norms, norms, strict=True)),
            "adapter_cosine": float(torch.nn.functional.cosine_similarity(got_adapter, adapter, dim=0)),
        }
        shown = ", ".join(f"{key} {out[name][key]:.2g}" for key in ("loss_gap", "norm_gap"))
        limit = 1e-4 if dtype == torch.float32 else 1e-2
        text = f"{shown}, adapter cosine {out[name]['adapter_cosine']:.6f}"
        run.find(f"{name} against cpu float32", text, good=out[name]["loss_gap"] <= limit)
        del model
        run.clear()
    return out


def _losses(
    model: Any, rows: list[Any], device: str, steps: int, fast: str = "auto"
) -> tuple[list[float], list[float], torch.Tensor]:
    """Loss and gradient norm of each step, and the adapter at the end, as Trainer computes them."""
    from tell.config_sections import TrainConfig
    from tell.train.lora import add_lora, remove_lora
    from tell.train.plain import PlainBody, plain_step_loss
    from tell.train.step import Body, StepRules, step_loss

    tuned = add_lora(model, TrainConfig(lora_dropout=0.0), seed=7, fused=fast == "auto")
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.01, fused=True)
    body = Body(tuned) if fast == "auto" else PlainBody(tuned)
    losses, norms, size = [], [], len(rows) // steps
    for i in range(steps):
        rules, options = StepRules(share_prefix=True), {"clip": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0)}
        part = rows[i * size : (i + 1) * size]
        if isinstance(body, Body):
            got = step_loss(body, part, rules, **options)
        else:
            got = plain_step_loss(body, part, rules, **options)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(got.loss)
        norms.append(got.norm or 0.0)
    adapter = torch.cat([p.detach().float().flatten().cpu() for p in parameters])
    remove_lora(tuned)
    return losses, norms, adapter


def merge(run: Run) -> dict[str, Any]:
    """Seconds and memory to fold an adapter in and out, with its originals on the card and in pinned host memory."""
    from tell.config_sections import TrainConfig
    from tell.train import lora

    size, out = run.sizes[-1], {}
    model = make_model(size, run.device, torch.bfloat16)
    tuned = lora.add_lora(model, TrainConfig(lora_dropout=0.0), seed=1)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(tuned, Path(folder))
        lora.remove_lora(tuned)
        del tuned
        before, room = _fingerprints(model), lora._room_for_copies
        for where, rule in (
            ("chosen", room), ("card", lambda _: True), ("host", lambda _: False), ("host again", lambda _: False)
        ):  # fmt: skip
            lora._room_for_copies = rule
            run.clear()
            held, begin = run.peak_gb(), time.perf_counter()
            with lora.adapter_merged(model, Path(folder)):
                run.sync()
                merged = time.perf_counter()
                peak = run.peak_gb()
                changed = all(x != y for x, y in zip(_fingerprints(model), before, strict=True))
                run.sync()
                back = time.perf_counter()
            run.sync()
            ended = time.perf_counter()
            exact = _fingerprints(model) == before
            more = None if held is None else round(peak - held, 2)
            out[where] = {"merge_s": round(merged - begin, 3), "unmerge_s": round(ended - back, 3), "more_gb": more}
            good = exact and changed and (more is None or not where.startswith("host") or more < 1)
            told = {**out[where], "exact": exact, "changed": changed}
            run.find(f"merge {size}, originals: {where}", told, good=good)
        lora._room_for_copies = room
    return out


def _fingerprints(model: Any) -> list[int]:
    """A number for the bits of each linear layer's weight, computed where it is."""
    out = []
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                bits = module.weight.detach().flatten().view(torch.int16).long()
                out.append((bits * (torch.arange(len(bits), device=bits.device) % 65521 + 1)).sum())
    return torch.stack(out).tolist()
