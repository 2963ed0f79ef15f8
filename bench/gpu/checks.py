"""Stages that check: what is installed, attention, resuming, losses against the CPU, a capture that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu import runners
from bench.gpu.run import Run, first_line, make_model, now, rows_for

PACKAGES = (
    "triton", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "unsloth", "liger-kernel", "flash-attn",
    "vllm", "numpy",
)  # fmt: skip


def facts(run: Run) -> dict[str, Any]:
    """Versions, the card, and its ceilings in matrix products and copies."""
    out = run.stages.setdefault("facts", {})
    out |= {"torch": torch.__version__, "python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = None
    if run.device == "cuda":
        from tell.models.machine import gpu

        card = torch.cuda.get_device_properties(0)
        out |= {"gpu": card.name, "nvidia-smi": gpu(), "memory_gib": round(card.total_memory / 2**30, 1)}
        run.save()
        x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        a, b = (torch.empty(2**31, dtype=torch.uint8, device="cuda") for _ in range(2))
        out |= {
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
    begin = now()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (now() - begin) / times


def attention(run: Run) -> dict[str, Any]:
    """Which attention serves, and its output and gradients for grouped heads against fp64."""
    from tell.kernels.ops import why_none
    from tell.train.attention import PackedPlan, Rule
    from tell.train.fast.cuda import attention_note, packed_plan

    model = make_model("tiny", run.device, torch.bfloat16)
    out = run.stages.setdefault("attention", {})
    out |= {"note": attention_note(model), "no kernels": why_none(model.get_output_embeddings().weight)}
    run.find("attention", out["note"], good=run.device == "cpu" or "flash" in out["note"])
    run.find("why no kernels", out["no kernels"], good=out["no kernels"] is None)
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
            worst = float(np.max(errors))  # NaN where one is
            out["worst"] = float(np.maximum(out.get("worst", 0.0), worst))
            run.find(f"{name}: errors of out, dq, dk, dv", out[name], good=worst <= 1e-2)
    return out


def resume(run: Run) -> dict[str, Any]:
    """A run that is stopped and resumed against one that is not; in its own process, for a fault would end this one."""
    code = "import json, sys; from bench.gpu.checks import resumed; print(json.dumps(resumed(sys.argv[1])))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), *sys.path]))}
    done = subprocess.run(
        [sys.executable, "-c", code, run.device], capture_output=True, text=True, env=environment,
        timeout=min(180.0, max(1.0, run.left)),
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        run.find("resume", lines[-1], good=False)
        return {"error": lines[-5:]}
    out = json.loads(done.stdout.strip().splitlines()[-1])
    run.find("resumed adapter, fp32", out["float32"], good=out["float32"]["equal"])
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
    """Losses and the adapter of eight steps of the Trainer: the device in each format against a CPU in fp32."""
    size, steps, batch = ("tiny", 3, 4) if run.tiny else ("smollm2-135m", 8, 16)
    rows, settings = rows_for(size, batch * steps, 0.2 if run.tiny else 0.5), {"learning_rate": 3e-4}
    out, plan = run.stages.setdefault("equal", {}), runners.Plan(batch, 0, steps)
    model = make_model(size, "cpu", torch.float32)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = runners.tell(run, model, rows, plan, settings)
    out["cpu float32"] = [round(x, 5) for x in expected.losses]
    ways = [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "off")]
    if run.device == "cuda":  # a CPU computes in bf16 or fp32
        ways.insert(2, (torch.float16, "auto"))
    for dtype, fast in ways:
        kind = str(dtype).removeprefix("torch.")
        name = kind if fast == "auto" else f"{kind} fast={fast}"
        if name in out or run.late(f"equal, {name}", 0 if run.tiny else 3):
            continue
        try:
            model = make_model(size, run.device, dtype)
            model.load_state_dict(state)
            got = runners.tell(run, model, rows, plan, {**settings, "fast": fast})
            out[name] = compared(got, expected)
            shown = ", ".join(f"{key} {out[name][key]:.2g}" for key in ("loss_gap", "norm_gap", "adapter_cosine"))
            limit = 1e-4 if dtype == torch.float32 else 1e-2
            run.find(f"{run.device} {name} against cpu float32", shown, good=out[name]["loss_gap"] <= limit)
        except Exception as error:
            run.failed(out, name, error)
        model = None
        run.clear()
        run.save()
    return out


def compared(got: runners.Timed, expected: runners.Timed) -> dict[str, Any]:
    """The largest relative differences of losses and of gradient norms; fp16 skips steps, which have no norm.

    Raises:
        ValueError: a loss is not finite, no step has a norm, or one of them was stopped.
    """
    if got.adapter is None or expected.adapter is None:
        raise ValueError(f"no time left after {len(got.losses)} of {len(expected.losses)} steps")
    if not np.isfinite(got.losses).all():
        raise ValueError(f"losses are not finite: {got.losses}")
    norms = [(x, y) for x, y in zip(got.norms, expected.norms, strict=True) if x is not None and y is not None]
    if not norms:
        raise ValueError("every step was skipped")
    cosine = torch.nn.functional.cosine_similarity(got.adapter.double(), expected.adapter.double(), dim=0)
    return {
        "losses": [round(x, 5) for x in got.losses],
        "loss_gap": _gap(zip(got.losses, expected.losses, strict=True)),
        "norm_gap": _gap(norms),
        "skipped": len(got.norms) - len(norms),
        "adapter_cosine": float(cosine),
        "notes": got.notes,
    }


def _gap(pairs: Iterable[tuple[float, float]]) -> float:
    return float(np.max([abs(x / y - 1) for x, y in pairs]))  # NaN where one is


def capture(run: Run) -> dict[str, Any]:
    """Whether a process goes on after a capture of a CUDA graph that failed: memory, training, another capture."""
    out = run.stages.setdefault("capture", {})
    if run.device != "cuda":
        out["skipped"] = "CUDA graphs are captured on a GPU of CUDA alone"
        run.find("a capture that fails", f"skipped: {out['skipped']}")
        return out
    if "failed with" in out:  # in the process before, which did not survive it
        return out
    from tell.train.capture import CudaCapturer

    out["failed with"] = _failed_capture(CudaCapturer(torch.device("cuda")))
    for name, step in (
        ("memory given back", torch.cuda.empty_cache),
        ("memory taken", lambda: torch.ones(2**20, device="cuda").sum().item()),
        ("a step trained", lambda: _one_step(run)),
        ("another capture", lambda: _captured(CudaCapturer(torch.device("cuda")))),
    ):
        try:
            step()
            torch.cuda.synchronize()
            out[name] = True
        except Exception as error:
            run.failed(out, name, error)
            if run.lost is not None:
                break
    out["recovered"] = all(out.get(name) is True for name in RECOVERED)
    run.find("recovered from a capture that failed", out, good=out["recovered"])
    return out


RECOVERED = ("memory given back", "memory taken", "a step trained", "another capture")


def _failed_capture(capturer: Any) -> str:
    """The error of a capture in whose midst the host asks for a number."""
    x = torch.ones(16, device=capturer.device)

    def work() -> None:
        (x + 1).sum().item()

    capturer.warm(work)
    try:
        capturer.capture(work)
    except Exception as error:
        return first_line(error)
    raise AssertionError("a capture with .item() inside did not fail")


def _one_step(run: Run) -> None:
    model = make_model("tiny", run.device, torch.bfloat16)
    losses = runners.tell(run, model, rows_for("tiny", 8, 0.2), runners.Plan(4, 0, 2), {}).losses
    if not np.isfinite(losses).all():
        raise ValueError(f"losses are not finite: {losses}")


def _captured(capturer: Any) -> None:
    x, y = torch.ones(16, device=capturer.device), torch.zeros(16, device=capturer.device)

    def work() -> None:
        y.add_(x)

    capturer.warm(work)
    capturer.capture(work)()
    if y.sum().item() != 32:
        raise ValueError("the replay computed something else")
