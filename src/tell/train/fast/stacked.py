"""Frozen linear layers over one input with their LoRA adapters: their outputs and gradients, without autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tell.kernels.ops import Kernels, kernels_for
from tell.kernels.products import Dropout, products_for
from tell.kernels.triton_ops import TritonKernels
from tell.train.fast.base_weight import Quantised, dense
from tell.train.flat import Slot, add_product, joined_rows, slot_of


def kernels_of(x: Tensor) -> Kernels:
    """The kernels for tensors like ``x``; callers have checked that they exist."""
    found = kernels_for(x)
    if found is None:
        raise RuntimeError(f"no kernels for {x.dtype} on {x.device}")
    return found


@dataclass(frozen=True, slots=True)
class Stack:
    """Frozen weights of linear layers over one input, one below the other.

    Attributes:
        weight, bias: (N, K), read through `dense`; (N,) or None.
        widths: N_i of each layer.
        scales: s_i of each layer's adapter; None where it has none.
        dropout: rate on the adapters' inputs; every layer draws its own mask.
    """

    weight: Tensor | Quantised
    bias: Tensor | None
    widths: tuple[int, ...]
    scales: tuple[float | None, ...]
    dropout: float


@lru_cache(maxsize=64)
def _column(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers)[:, None].to(device)


def column_of(numbers: Sequence[float], device: torch.device) -> Tensor:
    """(n, 1) fp32; made once, for a GPU would have to be waited for each time."""
    return _column(tuple(numbers), device)


def _seed(adapters: Sequence[Tensor], x: Tensor) -> int:
    """Of a layer's masks: drawn; on a GPU constant, for a pass that is replayed draws nothing on the host.

    There the seed that `draw_seed` refills differs between passes. Layers differ by their place among all adapters;
    those of one shape draw alike where there is no `FlatAdapters`.
    """
    if not isinstance(kernels_for(x), TritonKernels):
        return int(torch.randint(2**31, ()))
    slot = slot_of(adapters[0])
    return hash(tuple(a.shape for a in adapters)) % 2**31 if slot is None else int(slot.grad.storage_offset())


class Lora:
    """x W^T + b, plus (dropout_i(x) s_i A_i^T) B_i^T in the columns of each adapted layer, and its gradients."""

    def __init__(self, stack: Stack, adapters: Sequence[Tensor], x: Tensor) -> None:
        self.stack, self.seed, self.folds, dtype = stack, 0, False, x.dtype
        self.products = products_for(x) if sum(stack.widths) % 2 == 0 else None  # the kernels read pairs in both passes
        self.parts: list[tuple[slice, slice]] = []  # columns and ranks of each adapter
        column, rank, scales = 0, 0, []
        for width, scale in zip(stack.widths, stack.scales, strict=True):
            if scale is not None:
                r = adapters[2 * len(self.parts)].shape[0]
                self.parts.append((slice(column, column + width), slice(rank, rank + r)))
                scales += [scale] * r
                rank += r
            column += width
        if not self.parts:
            return
        if stack.dropout:
            self.seed = _seed(adapters, x)
        self.ends = [ranks.stop for _, ranks in self.parts]
        if stack.dropout and any(end % 2 for end in self.ends):
            self.products = None
        if self.products is not None:
            scales = [scale / (1 - stack.dropout) for scale in scales]  # the kept tensor itself is not scaled
        self.scale: Tensor | float = scales[0] if len(set(scales)) == 1 else column_of(scales, x.device)
        self.slots = self._find_slots(adapters, dtype)
        matrices = adapters if self.slots is None else [slot.shadow for slot in self.slots]
        a = joined_rows(matrices[0::2])
        a = torch.cat(list(matrices[0::2])) if a is None else a
        scaled = self.slots is not None or (isinstance(self.scale, float) and self.scale == 1)
        self.a = (a if scaled else a * self.scale).to(dtype)  # (R, K)
        self.blocks = [matrix.to(dtype) for matrix in matrices[1::2]]  # (N_i, r) of each adapter
        # In fp32 W + B A is exact enough, and from so many rows on cheaper to make than B A is to add to the output.
        exact = dtype == torch.float32 and x.device.type == "cpu" and not stack.dropout and self.products is None
        self.folds = exact and len(x) >= x.shape[1]
        # In one product, but not on a GPU where that costs more small launches, of copies, than the blocks' products.
        whole = x.device.type == "cpu" or any(matrix.dtype != dtype for matrix in matrices[1::2])
        apart = self.slots is not None or not whole
        self.joint = len(stack.widths) == 1 or not apart or self.folds or self.products is not None
        if self.joint:
            self.b = self.blocks[0] if len(stack.widths) == 1 else self._joined_blocks(column, rank)

    def _joined_blocks(self, width: int, rank: int) -> Tensor:
        """(N, R), with a block for each adapter and zeros elsewhere."""
        whole = self.a.new_zeros(width, rank)
        for (columns, ranks), block in zip(self.parts, self.blocks, strict=True):
            whole[columns, ranks] = block
        return whole

    def _find_slots(self, adapters: Sequence[Tensor], dtype: torch.dtype) -> list[Slot] | None:
        """The slots of all matrices, where their shadows are what this product needs."""
        slots = [slot for matrix in adapters if (slot := slot_of(matrix)) is not None]
        if len(slots) < len(adapters) or any(slot.shadow.dtype != dtype for slot in slots):
            return None
        # the scales may differ, or be those of kernels that do not scale what dropout keeps
        same = isinstance(self.scale, float) and {slot.scale for slot in slots[0::2]} == {self.scale}
        return slots if same else None

    def _expand(self, y: Tensor, u: Tensor) -> Tensor:
        """y + u B^T, in place."""
        if self.joint:
            return y.addmm_(u, self.b.t())
        for (columns, ranks), block in zip(self.parts, self.blocks, strict=True):
            y[:, columns].addmm_(u[:, ranks], block.t())
        return y

    def inner_gradient(self, gy: Tensor) -> Tensor:
        """(T, R) gradient of u: gy B."""
        if self.joint:
            return gy @ self.b
        gu = gy.new_empty(len(gy), len(self.a))
        for (columns, ranks), block in zip(self.parts, self.blocks, strict=True):
            torch.mm(gy[:, columns], block, out=gu[:, ranks])
        return gu

    def folded(self, beside: Tensor, dim: int) -> Tensor:
        """W + B A, with the adapters' thin matrix next to it so that one product serves both: where its rows or columns
        are split again anyway, for several layers."""
        weight, inner = dense(self.stack.weight, beside.dtype), len(self.stack.widths) > 1
        shape = [n + (beside.shape[dim] if inner and d == dim else 0) for d, n in enumerate(weight.shape)]
        whole = weight.new_empty(shape)
        own = whole.narrow(dim, 0, weight.shape[dim])
        torch.addmm(weight, self.b, self.a, out=own)
        if inner:
            whole.narrow(dim, weight.shape[dim], beside.shape[dim]).copy_(beside)
        return whole

    def _fold(self, x: Tensor, thin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
        """x times W + B A, and x times the adapters' first matrix from the same product."""
        whole = self.folded(thin, 1 if back else 0)
        product = x @ (whole if back else whole.t())
        if len(self.stack.widths) == 1:
            return product, x @ (thin if back else thin.t())
        y, inner = product.tensor_split((product.shape[1] - len(self.a),), dim=1)
        return y, inner.contiguous()  # a view would keep the whole product

    def _dropped(self, x: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Each adapter's number, ranks and input; the inputs share one buffer."""
        kept = torch.empty_like(x)
        for i, (_, ranks) in enumerate(self.parts):
            kernels_of(x).dropout(x, kept, self.stack.dropout, self.seed + i)
            yield i, ranks, kept

    def _adapters(self, into: Tensor, out_of: Tensor) -> tuple[Tensor, Tensor, list[int], Dropout]:
        return into, out_of, self.ends, Dropout(self.stack.dropout, self.seed)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, N) outputs of x (T, K), and u (T, R), the adapters' inner states."""
        stack = self.stack
        if self.products is not None:
            adapters = self._adapters(self.a, self.b) if self.parts else ()
            return self.products.forward(x, dense(stack.weight, x.dtype), stack.bias, *adapters)
        if self.parts and self.folds:
            y, u = self._fold(x, self.a, back=False)
            return y if stack.bias is None else y.add_(stack.bias), u
        y = torch.nn.functional.linear(x, dense(stack.weight, x.dtype), stack.bias)
        if not self.parts:
            return y, None
        if stack.dropout:
            u = x.new_empty(len(x), len(self.a))
            for _, ranks, kept in self._dropped(x):
                u[:, ranks] = kept @ self.a[ranks].t()
        else:
            u = x @ self.a.t()
        return self._expand(y, u), u

    def input_gradient(self, gy: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, K) gradient of x, and that of u."""
        stack = self.stack
        if self.products is not None:
            adapters = self._adapters(self.b, self.a) if self.parts else ()
            return self.products.backward(gy, dense(stack.weight, gy.dtype), *adapters)
        if self.parts and self.folds:
            return self._fold(gy, self.b, back=True)
        gx = gy @ dense(stack.weight, gy.dtype)
        if not self.parts:
            return gx, None
        gu = self.inner_gradient(gy)
        if stack.dropout:
            for i, (_, ranks) in enumerate(self.parts):
                part = gu[:, ranks] @ self.a[ranks]
                kernels_of(gx).dropout(part, gx, stack.dropout, self.seed + i, add=True)
        else:
            gx.addmm_(gu, self.a)
        return gx, gu

    def adapter_gradients(self, x: Tensor, gy: Tensor, u: Tensor, gu: Tensor) -> Sequence[Tensor | None]:
        """Gradients of A_i and B_i in turn; None where they have been added to those of ``FlatAdapters``."""
        if self.products is not None:
            return self._exact_gradients(x, gy, u, gu)
        if self.slots is not None:
            self._add_gradients(self.slots, x, gy, u, gu)
            return [None] * len(self.slots)
        if self.stack.dropout:
            ga = torch.empty_like(self.a)
            for _, ranks, kept in self._dropped(x):
                torch.mm(gu[:, ranks].t(), kept, out=ga[ranks])
        else:
            ga = gu.t() @ x
        ga = ga * self.scale  # in fp32 where the layers' scales differ
        gb = (u.t() @ gy).t()  # the library is several times as fast in this order
        return [g for columns, ranks in self.parts for g in (ga[ranks], gb[columns, ranks])]

    def _add_gradients(self, slots: list[Slot], x: Tensor, gy: Tensor, u: Tensor, gu: Tensor) -> None:
        parts = [slot.grad for slot in slots[0::2]]
        whole, scale = joined_rows(parts), slots[0].scale
        if self.stack.dropout:
            for i, ranks, kept in self._dropped(x):
                add_product(parts[i], gu[:, ranks].t(), kept, scale)
        elif whole is not None:
            add_product(whole, gu.t(), x, scale)
        else:
            for part, (_, ranks) in zip(parts, self.parts, strict=True):
                add_product(part, gu[:, ranks].t(), x, scale)
        for slot, (columns, ranks) in zip(slots[1::2], self.parts, strict=True):
            add_product(slot.grad, gy[:, columns].t(), u[:, ranks])

    def _exact_gradients(self, x: Tensor, gy: Tensor, u: Tensor, gu: Tensor) -> list[Tensor]:
        """The same in fp32, by the kernels."""
        assert self.products is not None
        outer, rate = self.products.outer, self.stack.dropout
        if rate:
            parts = [outer(gu[:, r], x, dropout=Dropout(rate, self.seed + i)) for i, (_, r) in enumerate(self.parts)]
            ga = torch.cat(parts)
        else:
            ga = outer(gu, x)
        ga *= self.scale
        pairs = ((ga[ranks], outer(u[:, ranks], gy[:, columns], transposed=True)) for columns, ranks in self.parts)
        return [g for pair in pairs for g in pair]
