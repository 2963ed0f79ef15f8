"""``TELL_CPU``: what it asks for, and training in a process held to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tell import cpu
from tell.errors import TellError
from tell.kernels import library, reason
from tell.models import load, machine
from tell.models.find import find_model

TRAIN = """
import json, sys
import tell
import numpy as np, torch
from tell.kernels import library
from tell.kernels.packed_attention import row_attention
from tell.kernels.products import products_for
from tell.models import machine
from tell.models.find import find_model
from tell.models.load import load_model
from tell.train.packing import TrainRow
from tell.config import TrainConfig
from tell.train.lora import add_lora
from tell.train.plain import PlainBody, plain_step_loss
from tell.train.fast.fused import fused_counts
from tell.train.step import Body, StepRules, step_loss

loaded = load_model(find_model(sys.argv[1]), device="cpu")
tuned = add_lora(loaded.model, TrainConfig(lora_dropout=0.0), seed=1)
draw = np.random.default_rng(0)
rows = [TrainRow(draw.integers(5, 400, n), np.arange(n) >= 4, 0, True) for n in (9, 30, 17)]
parameters = [p for p in tuned.parameters() if p.requires_grad]
with torch.no_grad():
    for p in parameters:
        p.normal_(std=0.05)

def gradients(step, body):
    loss = step(body, rows, StepRules()).loss
    grads = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return loss, grads

body = Body(tuned)
kinds = fused_counts(loaded.model)
fast, ours = gradients(step_loss, body)
plain, theirs = gradients(plain_step_loss, PlainBody(tuned))
print(json.dumps({
    "capability": torch.backends.cpu.get_cpu_capability(), "why": loaded.why, "processor": machine.cpu_name(),
    "library": library()._name, "kinds": kinds, "fast": fast, "plain": plain,
    "error": float((ours - theirs).norm() / theirs.norm()),
    "bf16 kernels": products_for(torch.zeros(64, 64, dtype=torch.bfloat16)) is not None
    or row_attention(torch.bfloat16, 64) is not None,
}))
"""


def test_levels(monkeypatch):
    monkeypatch.delenv(cpu.SWITCH, raising=False)
    assert cpu.cpu_level() is None
    for value in ("avx2", "AVX2"):
        monkeypatch.setenv(cpu.SWITCH, value)
        assert cpu.cpu_level().name == "avx2"
    assert machine.cpu_bf16() is None and machine.cpu_name().endswith("(avx2)")  # speeds are kept by this name
    monkeypatch.setenv(cpu.SWITCH, "avx3")
    with pytest.raises(TellError, match="'avx3' is not an instruction set"):
        machine.cpu_bf16()
    variables = {cpu.SWITCH: "avx3"}
    cpu.limit_libraries(variables)
    assert variables == {cpu.SWITCH: "avx3"}  # an import raises nothing


def test_torch_that_was_there_first_is_refused(tiny_model, monkeypatch):
    monkeypatch.setenv(cpu.SWITCH, "avx2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(TellError, match="torch computes with AVX512"):
        load.load_model(find_model(str(tiny_model("llama"))), device="cpu")


@pytest.mark.skipif(machine.platform.machine() != "x86_64", reason="AVX2 is of x86 processors")
@pytest.mark.skipif(library() is None, reason=f"no kernels: {reason()}")
def test_training_as_on_an_avx2_machine(tiny_model):
    """Norms, attention and MLPs are all exchanged, and train as transformers and peft do."""
    variables = {**os.environ, cpu.SWITCH: "avx2", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TRAIN, str(tiny_model("llama"))]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["capability"] == "AVX2" and found["processor"].endswith("(avx2)")
    assert found["why"] == "fp32: $TELL_CPU=avx2 leaves the CPU no bf16"
    assert found["library"] != library()._name and not found["bf16 kernels"]
    assert found["kinds"] == {"norm": 5, "attention": 2, "mlp": 2}
    assert found["fast"] == pytest.approx(found["plain"], rel=1e-5) and found["error"] < 1e-4
