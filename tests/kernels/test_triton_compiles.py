"""Each Triton kernel becomes machine code of old and new GPUs, with the shapes of real models."""

from __future__ import annotations

import pytest
import torch

from kernels.compiled import CompiledKernels
from tell.kernels.ops import GELU_TANH
from tell.kernels.triton_ops import HeadLayout

pytest.importorskip("triton", reason='needs Triton: pip install "tell-llm[test]"')
ROWS, HIDDEN, WIDE, QUERIES, KEYS, WIDTH, VOCABULARY = 9, 4096, 14336, 32, 8, 128, 128256


def norm(kernels, x, f):
    kernels.rmsnorm(x(HIDDEN), x(HIDDEN), x(HIDDEN)[0], f(1), eps=1e-5, offset=0.0)


def norm_back(kernels, x, f):
    kernels.rmsnorm_back(x(HIDDEN), x(HIDDEN), x(HIDDEN)[0], f(1), x(HIDDEN), offset=1.0)


def gated(kernels, x, f):
    kernels.gated(x(WIDE), x(WIDE), x(WIDE), GELU_TANH)


def gated_back(kernels, x, f):
    kernels.gated_back(x(WIDE), x(WIDE), x(WIDE), x(WIDE), x(WIDE), GELU_TANH)


def cross_entropy(kernels, x, f):
    kernels.cross_entropy(x(VOCABULARY), f(1).long(), f(1), f(1), 30.0)


def dropout(kernels, x, f):
    kernels.dropout(x(HIDDEN), x(HIDDEN), 0.9, 2**31 - 1, add=True)


def layout(x):
    eps = {"query_eps": 1e-5, "key_eps": 1e-5}
    norms = {"query_norm": x(WIDTH)[0], "key_norm": x(WIDTH)[0], **eps, "offset": 1.0}
    return HeadLayout(QUERIES, KEYS, WIDTH, x(WIDTH), x(WIDTH), **norms)


def heads(kernels, x, f):
    kernels.heads(x(layout(x).columns), x((QUERIES + KEYS) * WIDTH), f(QUERIES + KEYS), layout(x))


def heads_back(kernels, x, f):
    columns, grads = layout(x).columns, (x(QUERIES * WIDTH), x(KEYS * WIDTH), x(KEYS * WIDTH))
    kernels.heads_back(grads, x(columns), x(columns), f(QUERIES + KEYS), layout(x))


@pytest.mark.parametrize(("capability", "dtype"), [(75, torch.float16), (80, torch.float32), (90, torch.bfloat16)])
@pytest.mark.parametrize("launch", [norm, norm_back, gated, gated_back, cross_entropy, dropout, heads, heads_back])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiles(capability, dtype, launch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = CompiledKernels(capability)

    def make(width, form=dtype):
        return torch.empty(ROWS, width, dtype=form, device="meta")

    launch(kernels, make, lambda width: make(width, torch.float32))
    (binary,) = kernels.binaries.values()
    assert f"sm_{capability}" in binary.asm["ptx"] and len(binary.asm["cubin"]) > 1000
    assert binary.metadata.shared < 48 * 1024  # bytes that every GPU gives a program
    assert ".local" not in binary.asm["ptx"]  # no registers spilt by the compiler's first half
