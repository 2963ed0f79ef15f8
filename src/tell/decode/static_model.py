"""A decoder as tensor operations on its parts, few a layer: what a batch with a static cache runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from tell.decode.layers import SILU, Description, attention_rules
from tell.pass_memory import SHARE
from tell.train.device import free_bytes
from tell.train.fast.base_weight import quantised_weight
from tell.train.flat import joined_rows
from tell.train.unmerged import adapted

if TYPE_CHECKING:
    from torch import nn

    from tell.train.step import Body

# Attention of a layer: (its number, queries (n, H, D), keys (n, Hk, D), values (n, Hk, D)) to (n, H * D).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# Cosines and signed sines of n positions, (n, 1, rotated width) each, by the name of the rotary table.
Rope = dict[str, tuple[Tensor, Tensor]]


class LayerProduct:
    """x (n, i) to x W^T + b (n, o) of linear layers with the same input, next to each other: each by its own forward.

    Quantised layers are multiplied like this: in 4 bits by bitsandbytes' product, which for few rows reads the packed
    weights; in 8 bits by W made anew at each step. Neither waits for the device, and torch allocates all that they
    use, so a step with them can be recorded.

    Adapters beside the layers add x A^T B^T in two products for all of them: A (r, i) has theirs one below the other,
    B (o, r) is block-diagonal. Its zeros cost less than a launch for each layer: at rank 16, B of q, k and v of an 8B
    model has 0.6 MB and their weights 50.

    Args:
        layers: at least one.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self.adapter = _joined_adapters(layers)

    def __call__(self, x: Tensor) -> Tensor:
        out = self._base(x)
        self._adapt(out, x)
        return out

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual (n, o) += x W^T + b."""
        self._add_base(residual, x)
        self._adapt(residual, x)

    def _base(self, x: Tensor) -> Tensor:
        parts = [type(layer).forward(layer, x) for layer in self.layers]  # the class's: without adapters
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _add_base(self, residual: Tensor, x: Tensor) -> None:
        residual += self._base(x)

    def _adapt(self, out: Tensor, x: Tensor) -> None:
        if self.adapter is not None:
            a, b = self.adapter
            out.addmm_(x @ a.t(), b.t())


class JoinedProduct(LayerProduct):
    """The same by plain weights, in one product where they follow each other in memory.

    Args:
        layers: at least one, none quantised.
        join: copy weights that do not follow each other in memory, as training leaves them, into one matrix; False
            multiplies by each in place.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, join: bool) -> None:
        super().__init__(layers)
        parts: list[tuple[Tensor, Tensor | None]] = [
            (layer.weight.detach(), None if layer.bias is None else layer.bias.detach()) for layer in layers
        ]
        weights = [weight for weight, _ in parts]
        whole = joined_rows(weights)
        if whole is None and join:
            whole = torch.cat(weights)
        if whole is not None and len(parts) > 1:
            parts = [(whole, _joined_bias(parts))]
        self.parts = parts
        self.outputs = sum(len(weight) for weight, _ in parts)

    def _base(self, x: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return functional.linear(x, *self.parts[0])
        out, at = x.new_empty(len(x), self.outputs), 0
        for weight, bias in self.parts:
            into = out[:, at : at + len(weight)]
            if bias is None:
                torch.mm(x, weight.t(), out=into)
            else:
                torch.addmm(bias, x, weight.t(), out=into)
            at += len(weight)
        return out

    def _add_base(self, residual: Tensor, x: Tensor) -> None:
        ((weight, bias),) = self.parts
        if bias is None:
            residual.addmm_(x, weight.t())
        else:
            residual += functional.linear(x, weight, bias)


def _product(layers: Sequence[nn.Linear], *, join: bool) -> LayerProduct:
    return JoinedProduct(layers, join=join) if quantised_weight(layers) is None else LayerProduct(layers)


def _joined_bias(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    if all(bias is None for _, bias in parts):
        return None
    return torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts])


def _joined_adapters(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor] | None:
    found = [adapted(layer) for layer in layers]
    factors = [product.a for product in found if product is not None]
    if not factors:
        return None
    blocks = [
        factors[0].new_zeros(layer.out_features, 0) if product is None else product.b
        for layer, product in zip(layers, found, strict=True)
    ]
    return torch.cat(factors), torch.block_diag(*blocks)


class StaticModel:
    """A model that ``layers.describe`` supports, on any device.

    Layers that read the same input are joined where the copies of their weights leave room on the device.

    Args:
        join: whether to join them; None: where there is room.
    """

    def __init__(self, description: Description, body: Body, *, join: bool | None = None) -> None:
        self.description, self.body = description, body
        products = [layer.products() for layer in description.layers]
        if join is None:
            joined = [part for layer in products for part in layer if len(part) > 1 and quantised_weight(part) is None]
            copied = sum(layer.weight.nbytes for part in joined for layer in part)
            join = SHARE * copied <= free_bytes(description.embedding.device)
        self.products = [tuple(_product(part, join=join) for part in layer) for layer in products]
        self.rules = attention_rules(description, body)
        self.norms = [
            tuple(map(self._kept, (layer.before_attention, layer.after_attention, layer.before_mlp, layer.after_mlp)))
            for layer in description.layers
        ]
        self.head_norms = [self._head_norm(layer.query_norm, layer.key_norm) for layer in description.layers]
        self.last_norm = self._kept(description.norm)

    def _kept(self, weight: Tensor | None) -> Tensor | None:
        """A norm's weight in the format in which it multiplies."""
        exact = self.description.exact_norms
        return weight.to(self.description.dtype) if exact and weight is not None else weight

    def _head_norm(self, query: Tensor | None, key: Tensor | None) -> Tensor | None:
        """(H + Hk, D) weights of the norms of queries and keys."""
        d = self.description
        if query is None or key is None:
            return None
        return torch.cat([query.expand(d.heads, -1), key.expand(d.kv_heads, -1)])

    def rotary_tables(self, positions: int) -> Rope:
        """By name: cosines and signed sines (positions, 1, rotated width), so that x cos + swapped x sin rotates x."""
        tables: Rope = {}
        for name, (cosine, sine) in self.description.rotary_tables(positions).items():
            half = sine.shape[1] // 2
            signed = torch.cat([-sine[:, :half], sine[:, half:]], dim=1)
            cosine, signed = (x.to(self.description.dtype)[:, None].contiguous() for x in (cosine, signed))
            tables[name] = cosine, signed
        return tables

    def forward(self, ids: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """(n, h) final states, normed, of tokens (n,)."""
        d = self.description
        residual = functional.embedding(ids, d.embedding)
        if d.embedding_scale != 1:
            residual = residual * d.embedding_scale
        for index, layer in enumerate(d.layers):
            (qkv, output, gate_up, down), norms = self.products[index], self.norms[index]
            x = qkv(self._norm(residual, norms[0]))
            both, v = x.unflatten(1, (-1, d.width)).split([d.heads + d.kv_heads, d.kv_heads], dim=1)
            if (weight := self.head_norms[index]) is not None:
                both = functional.rms_norm(both.float(), (d.width,), None, d.eps).mul_(weight).to(x.dtype)
            _rotate(both, *rope[layer.rope])
            q, k = both.split([d.heads, d.kv_heads], dim=1)
            self._add(residual, output, attend(index, q, k, v), norms[1])
            gate, up = gate_up(self._norm(residual, norms[2])).chunk(2, dim=1)
            active = functional.silu(gate) if d.activation == SILU else functional.gelu(gate, approximate="tanh")
            self._add(residual, down, active.mul_(up), norms[3])
        return self._norm(residual, self.last_norm)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        shape, eps = (x.shape[1],), self.description.eps
        if self.description.exact_norms:
            return functional.rms_norm(x, shape, weight, eps)
        return functional.rms_norm(x.float(), shape, weight, eps).to(x.dtype)

    def _add(self, residual: Tensor, product: LayerProduct, x: Tensor, norm: Tensor | None) -> None:
        if norm is None:
            product.add_to(residual, x)
        else:
            residual += self._norm(product(x), norm)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Rotate the first dimensions of heads (n, H, D) in place."""
    turned = x[..., : cosine.shape[-1]]
    swapped = turned.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    turned.mul_(cosine).addcmul_(swapped, sine)
