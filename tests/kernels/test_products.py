"""Products with an adapter beside them, and the adapter's gradients, against fp64."""

from __future__ import annotations

import pytest
import torch

from tell.kernels.ops import kernels_for
from tell.kernels.products import Dropout, products_for

products = products_for(torch.zeros(64, 2, dtype=torch.bfloat16))
needs_products = pytest.mark.skipif(products is None, reason="no dot products of bf16 pairs, or a tile unit")


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


# one tile; no whole tile, panel or pair; several vectors of ranks; more inputs than are taken at a time, several blocks
SHAPES = [(12, 64, 64, 8), (31, 70, 50, 5), (50, 200, 96, 24), (40, 48, 34, 70), (600, 40, 3300, 17)]


@needs_products
@pytest.mark.parametrize(("tokens", "outputs", "inputs", "rank"), SHAPES)
@pytest.mark.parametrize("adapted", [True, False])
def test_products_both_ways(tokens, outputs, inputs, rank, adapted):
    x, weight, bias, gy = (
        draw(tokens, inputs + 6, seed=1)[:, :inputs],  # rows may be strided
        draw(outputs, inputs, seed=2),
        draw(outputs, seed=3),
        draw(tokens, outputs, seed=4),
    )
    a, b = (draw(rank, inputs, seed=5), draw(outputs, rank, seed=6)) if adapted else (None, None)
    y, u = products.forward(x, weight, bias, a, b)
    exact, gx_exact = x.double() @ weight.double().t() + bias.double(), gy.double() @ weight.double()
    if adapted:
        assert error(u, x.double() @ a.double().t()) < 3e-3
        exact += u.double() @ b.double().t()  # the inner states are bf16
    assert error(y, exact) < 3e-3  # one rounding to bf16: 2^-9 at most
    gx, gu = products.backward(gy, weight, b, a)
    if adapted:
        assert error(gu, gy.double() @ b.double()) < 3e-3
        gx_exact += gu.double() @ a.double()
    assert error(gx, gx_exact) < 3e-3


@needs_products
@pytest.mark.parametrize(("tokens", "rank", "columns"), [(12, 8, 32), (129, 5, 50), (301, 24, 100), (128, 1, 1)])
def test_outer_products(tokens, rank, columns):
    g, x = draw(tokens, rank + 3, seed=1)[:, :rank], draw(tokens, columns + 2, seed=2)[:, :columns]
    exact = 0.5 * g.double().t() @ x.double()
    out = products.outer(g, x, 0.5)
    assert out.dtype == torch.float32 and error(out, exact) < 1e-6
    assert torch.equal(out, products.outer(g, x, 0.5))
    assert error(products.outer(g, x, 0.5, transposed=True), exact.t()) < 1e-6


@needs_products
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(31, 70, 50), (300, 40, 1700)])
def test_dropout_is_that_of_the_kernel(tokens, outputs, inputs):
    """Every adapter has a mask of its own, the same on both ways."""
    ends, dropout = [4, 10, 54], Dropout(0.3, 11)
    x, gy = draw(tokens, inputs, seed=1), draw(tokens, outputs, seed=2)
    weight, a, b = draw(outputs, inputs, seed=3), draw(54, inputs, seed=4), draw(outputs, 54, seed=5)
    y, u = products.forward(x, weight, None, a, b, ends, dropout)
    gx, gu = products.backward(gy, weight, b, a, ends, dropout)
    gx_exact = gy.double() @ weight.double()
    for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        kept = torch.empty_like(x)
        kernels_for(x).dropout(torch.ones_like(x), kept, 0.3, 11 + i)
        dropped = x.double() * (kept != 0)
        assert error(u[:, begin:end], dropped @ a[begin:end].double().t()) < 3e-3
        gx_exact += (kept != 0) * (gu[:, begin:end].double() @ a[begin:end].double())
        ga = products.outer(gu[:, begin:end], x, dropout=Dropout(0.3, 11 + i))
        assert error(ga, gu[:, begin:end].double().t() @ dropped) < 1e-6
    assert error(y, x.double() @ weight.double().t() + u.double() @ b.double().t()) < 3e-3
    assert error(gx, gx_exact) < 3e-3


@needs_products
def test_where_the_library_is_left_to_it():
    assert products_for(torch.zeros(64, 2)) is None
    assert products_for(torch.zeros(2, 64, dtype=torch.bfloat16)) is None
    assert products_for(torch.zeros(64, 3, dtype=torch.bfloat16)) is None
    assert products_for(torch.zeros(1, 1, dtype=torch.bfloat16).expand(64, 2)) is None


def test_nothing_is_compiled_for_tensors_of_other_devices(monkeypatch):
    monkeypatch.setattr("tell.kernels.products._products", lambda: pytest.fail("compiled"))
    assert products_for(torch.zeros(64, 2, dtype=torch.bfloat16, device="meta")) is None
