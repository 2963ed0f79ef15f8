"""What a training step launches and keeps on a GPU, counted on the meta device with real shapes."""

from __future__ import annotations

import pytest
import torch
from bench.gpu import counts, run

KERNELS = {"rmsnorm": 2, "rmsnorm_back": 2, "heads": 1, "heads_back": 1, "gated": 1, "gated_back": 1}  # of a layer
# 8 products with frozen weights, 24 of adapters, 2 residual sums a way, attention (which zeroes two gradients that
# nobody reads) each way, and the kernels.
LAYER = 8 + 24 + 4 + 4 + sum(KERNELS.values())
CASTS = {"_to_copy", "copy_", "mul", "cat", "new_zeros", "clone"}  # of the adapters
MOST = {"smollm2-135m": 2_500, "llama3-8b": 2_500}  # launches of a step, casts of the adapters aside
BYTES = {"smollm2-135m": 14 * 1024, "llama3-8b": 110 * 1024}  # kept per token and layer

needs_varlen = pytest.mark.skipif(counts._torch_varlen() is None, reason="this torch has no varlen_attn with windows")


@needs_varlen
@pytest.mark.parametrize("size", MOST)
def test_a_step_launches_and_keeps_no_more(size):
    few, more = (counts.count_step(size, layers) for layers in (1, 2))
    layer = more.names - few.names
    work = {name: n for name, n in layer.items() if name not in CASTS}
    assert {name.removeprefix("triton "): n for name, n in work.items() if name.startswith("triton")} == KERNELS
    assert sum(work.values()) <= LAYER
    layers = run.SIZES[size]["num_hidden_layers"]
    launches = few.launches + (layers - 1) * sum(work.values())
    assert launches < MOST[size], launches
    assert (more.saved - few.saved) / few.tokens < BYTES[size]


@needs_varlen
def test_without_kernels_more_is_launched_and_kept():
    ours, plain = (counts.count_step("tiny", 2, kernels=kernels) for kernels in (True, False))
    assert plain.launches > 1.5 * ours.launches and plain.saved > 1.2 * ours.saved
    assert not any(name.startswith("triton") for name in plain.names)


@needs_varlen
def test_an_optimiser_is_counted_as_well():
    def finish(parameters):
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    assert counts.count_step("tiny", 1, finish=finish).launches > counts.count_step("tiny", 1).launches


def test_the_command_prints_before_and_after(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["counts", "--sizes", "tiny", "--names"])
    counts.main()
    own, triton, layer = capsys.readouterr().out.splitlines()
    assert "modules' own forwards" in own and "Triton's kernels" in triton and "triton gated 1" in layer
