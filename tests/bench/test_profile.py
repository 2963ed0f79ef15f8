"""The profile of a training step: nothing that multiplies is missed, and nothing stays wrapped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bench.profile import Clock, main, train_rows, watch
from bench.rows import make_rows, plain_tokens
from torch.utils._python_dispatch import TorchDispatchMode

from tell.config_sections import TrainConfig
from tell.models.find import find_model
from tell.models.load import load_model
from tell.train.lora import add_lora
from tell.train.step import Body, StepRules, step_loss

ROOT = Path(__file__).resolve().parents[2]


class Seen(TorchDispatchMode):
    """FLOPs of every product that torch runs."""

    flops = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            self.flops += 2 * out.numel() * args[1 if "add" in name else 0].shape[-1]
        return out


def test_every_product_of_a_step_is_counted(tiny_model):
    files = find_model(str(tiny_model("llama")))
    model = load_model(files, device="cpu", dtype="fp32").model
    body = Body(add_lora(model, TrainConfig(lora_r=2, lora_dropout=0.0), seed=0))
    rows = make_rows(8, plain_tokens(files.path), 0, 0.1)
    vocabulary, width = body.head.shape
    clock = Clock()
    with ExitStack() as stack, Seen() as seen:
        watch(clock, stack, vocabulary, 2)
        step_loss(body, train_rows(rows, range(8)), StepRules("example", share_prefix=True))
    assert sum(clock.flops.values()) == seen.flops
    assert clock.flops["products: output layer"] == 4 * int(rows.trained.sum()) * vocabulary * width
    assert clock.flops["products: layers"] > clock.flops["products: adapters"] > 0
    assert clock.calls.keys() == clock.seconds.keys() and all(s > 0 for s in clock.seconds.values())


def test_the_table_is_printed_and_torch_left_as_it_was(tiny_model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    before = torch.mm, torch.nn.functional.linear, torch.Tensor.__matmul__
    sizes = "--steps 1 --batch 2 --length-scale 0.1 --no-keep-memory"
    assert main(["--model", str(tiny_model("llama")), *sizes.split()]) == 0
    assert before == (torch.mm, torch.nn.functional.linear, torch.Tensor.__matmul__)
    text = capsys.readouterr().out
    assert "real tokens/s" in text and "products: layers" in text and "everything else" in text
    assert re.search(r"page faults [\d,]+ and system time \d+\.\d\d s a step", text)
    assert main(["--steps", "0"]) == 1
    assert "--steps" in capsys.readouterr().err


def test_kernels_that_cannot_be_compiled_say_why(tmp_path):
    paths = f"{ROOT}{os.pathsep}{ROOT / 'src'}"
    environment = {**os.environ, "TELL_HOME": str(tmp_path), "TELL_KERNELS": "off", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "bench.profile", "--compile"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "switched off" in done.stderr
