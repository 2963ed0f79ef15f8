"""What a training step launches and keeps on a GPU, counted on the meta device with real shapes."""

from __future__ import annotations

import pytest
from bench.gpu import counts, run

from tell.models.architecture import read_architecture
from tell.models.predict import fused_bytes

KERNELS = {"rmsnorm": 4, "rmsnorm_back": 2, "heads": 1, "heads_back": 1, "gated": 1, "gated_back": 1}  # of a layer
# 8 products with frozen weights, 33 of adapters, 2 residual sums a way, attention each way, and the kernels.
LAYER = 8 + 33 + 4 + 2 + sum(KERNELS.values())
MOST = {"smollm2-135m": 1_800, "llama3-8b": 1_900}  # launches of a step
BYTES = {"smollm2-135m": 12_000, "llama3-8b": 95_000}  # kept per token and layer

needs_varlen = pytest.mark.skipif(counts._torch_varlen() is None, reason="this torch has no varlen_attn with windows")


@needs_varlen
@pytest.mark.parametrize("size", MOST)
def test_a_step_launches_and_keeps_no_more(size, tmp_path):
    few, more = (counts.count_step(size, layers) for layers in (1, 2))
    layer, layers = more.names - few.names, run.SIZES[size]["num_hidden_layers"]
    assert {name.removeprefix("triton "): n for name, n in layer.items() if name.startswith("triton")} == KERNELS
    assert layer.total() <= LAYER and few.launches + (layers - 1) * layer.total() < MOST[size]
    kept = (more.saved - few.saved) / few.tokens
    arch = read_architecture(tmp_path, {**run.SIZES[size], "model_type": run.SIZES[size]["kind"]})
    assert kept < BYTES[size]
    assert kept == pytest.approx(fused_bytes(arch, 2, rank=8, targets="all-linear", gpu=True), rel=0.01)


@needs_varlen
def test_without_kernels_more_is_launched_and_kept():
    ours, plain = (counts.count_step("tiny", 2, kernels=kernels) for kernels in (True, False))
    assert plain.launches > 1.5 * ours.launches and plain.saved > 1.2 * ours.saved
    assert not any(name.startswith("triton") for name in plain.names)


def test_the_command_prints_before_and_after(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["counts", "--sizes", "tiny", "--names"])
    counts.main()
    own, triton, layer = capsys.readouterr().out.splitlines()
    assert "modules' own forwards" in own and "Triton's kernels" in triton and "triton gated 1" in layer
