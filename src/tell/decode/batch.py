"""A batch of rows being decoded, in two equivalent implementations: torch operations, or the kernels.

Both keep rows at places 0 to n - 1 of the batch; the last row takes the place of a finished one.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tell.decode.kv_cache import DecodePlan, PrefillPlan, PrefixPlan, Store
from tell.decode.layers import Description, Product, attention_rules
from tell.decode.sampler import Decoding, choose
from tell.kernels import decode_ops as c
from tell.train.attention import Plan, use_plan
from tell.train.device import send
from tell.train.step import Body

PREFILL_TOKENS = 1024  # tokens of one pass through the kernels: its activations stay in the cache


class Batch(Protocol):
    """The interface of both implementations.

    Attributes:
        vocabulary: rows of the model's output matrix, V.
    """

    vocabulary: int

    def prefill(self, rows: Sequence[Sequence[int]], begin: int) -> Tensor:
        """(n, h) final states at the last token of new rows, which get the places from ``begin`` on."""
        ...

    def decode(self, lengths: Sequence[int], last: Sequence[int]) -> Tensor:
        """(n, h) final states of all rows after one more token; ``lengths``: tokens of each row already cached."""
        ...

    def extend(self, lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
        """(n, h) final states of all rows after one or several more tokens each; ``lengths`` as in `decode`."""
        ...

    def see(self, begin: int, prompts: Sequence[Sequence[int]]) -> None:
        """Reset the repetition penalty of the rows from ``begin`` on to the tokens of their prompts."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """(n, V) fp32 logits of final states (n, h)."""
        ...

    def choose(self, states: Tensor, places: Sequence[int], draws: Tensor, allowed: Tensor | None = None) -> list[int]:
        """Next tokens of the rows at some places; draws (n,) fp32 in [0, 1).

        Args:
            allowed: (n, V) bool, the tokens that may be chosen; None: all.
        """
        ...

    def mark(self, places: Sequence[int], tokens: Sequence[int]) -> None:
        """Count tokens that were decided elsewhere for the repetition penalty of their rows."""
        ...

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Rows at ``sources``, at most ``length`` tokens long, take the places of finished ones at ``targets``."""
        ...


def only(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Logits (n, V), changed in place: -inf where ``allowed`` (n, V) is False; None allows all."""
    return logits if allowed is None else logits.masked_fill_(~allowed, float("-inf"))


def _each_token(begun: Sequence[int], rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Of each token of rows that go on after ``begun`` tokens: its position, and the number of its row."""
    at = [start + i for start, row in zip(begun, rows, strict=True) for i in range(len(row))]
    return at, [number for number, row in enumerate(rows) for _ in row]


class PlainBatch:
    """Any model and device, through transformers' own layers.

    Args:
        slots: rows decoded at once.
        capacity: tokens a row may have after the prefix.
        prefix: token ids that all rows begin with.
    """

    def __init__(
        self, body: Body, decoding: Decoding, slots: int, capacity: int, prefix: Sequence[int], device: torch.device
    ) -> None:
        self.body, self.decoding, self.device, self.prefix = body, decoding, device, len(prefix)
        self.store = Store(slots, capacity)
        self.vocabulary = len(body.head)
        self.seen = torch.zeros(slots, self.vocabulary, dtype=torch.bool, device=device)
        if prefix:
            self._forward(PrefixPlan(len(prefix), self.store, device), prefix)

    def _indices(self, ids: Any) -> Tensor:
        return send(torch.as_tensor(ids, dtype=torch.long), self.device)

    def _forward(self, plan: Plan, ids: Sequence[int]) -> Tensor:
        with use_plan(plan):
            tokens = self._indices(ids)[None]
            out = self.body.core(input_ids=tokens, position_ids=plan.positions(), use_cache=False)  # type: ignore[attr-defined]
        return out.last_hidden_state[0]

    def prefill(self, rows: Sequence[Sequence[int]], begin: int) -> Tensor:
        lengths = [len(row) for row in rows]
        plan = PrefillPlan(lengths, list(range(begin, begin + len(rows))), self.store, self.prefix, self.device)
        states = self._forward(plan, [token for row in rows for token in row])
        return states.index_select(0, self._indices(np.cumsum(lengths) - 1))

    def decode(self, lengths: Sequence[int], last: Sequence[int]) -> Tensor:
        return self._forward(DecodePlan(lengths, self.store, self.prefix, self.device), last)

    def extend(self, lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
        at, slots = _each_token(lengths, rows)
        plan = DecodePlan(at, self.store, self.prefix, self.device, slots)
        states = self._forward(plan, [token for row in rows for token in row])
        return states.index_select(0, self._indices(np.cumsum([len(row) for row in rows]) - 1))

    def see(self, begin: int, prompts: Sequence[Sequence[int]]) -> None:
        seen = self.seen[begin : begin + len(prompts)].fill_(False)
        starts = np.repeat(np.arange(len(prompts)) * seen.shape[1], [len(prompt) for prompt in prompts])
        seen.view(-1).index_fill_(0, self._indices(starts + np.concatenate(prompts)), True)

    def logits(self, states: Tensor) -> Tensor:
        body = self.body
        logits = functional.linear(states * body.logit_scale, body.head, body.bias).float()
        return logits if body.softcap is None else torch.tanh(logits / body.softcap) * body.softcap

    def choose(self, states: Tensor, places: Sequence[int], draws: Tensor, allowed: Tensor | None = None) -> list[int]:
        first = places[0]  # a slice is a view, and all rows without a guide are one
        at = slice(first, first + len(places)) if isinstance(places, range) else self._indices(places)
        logits = only(self.logits(states), allowed)
        chosen = choose(logits, self.seen[at], send(draws, self.device), self.decoding)
        if isinstance(at, slice):
            self.seen[at].scatter_(1, chosen[:, None], True)
        else:
            self.seen[at, chosen] = True
        return chosen.tolist()  # the only wait for a GPU in each step

    def mark(self, places: Sequence[int], tokens: Sequence[int]) -> None:
        self.seen[self._indices(places), self._indices(tokens)] = True

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        source, target = self._indices(sources), self._indices(targets)
        self.store.move(source, target, length)
        self.seen.index_copy_(0, target, self.seen.index_select(0, source))


class Packed:
    """A model's weights in the kernels' layout: a copy as large as the linear layers."""

    def __init__(self, description: Description, body: Body) -> None:
        self.description, self.body = description, body
        self.products = [
            tuple(Product(*((m.weight, m.bias) for m in part)) for part in layer.products())
            for layer in description.layers
        ]
        self.head = Product((body.head, body.bias))
        self.rules = attention_rules(description, body)


class KernelBatch:
    """A model that ``layers.describe`` supports, on the CPU: products by torch, all else in C.

    Args:
        packed: the weights.
        slots: rows decoded at once.
        capacity: tokens a row may have after the prefix.
        prefix: token ids that all rows begin with.
    """

    def __init__(self, packed: Packed, decoding: Decoding, slots: int, capacity: int, prefix: Sequence[int]) -> None:
        self.packed, self.description, self.decoding = packed, packed.description, decoding
        found = c.kernels(self.description.dtype)
        assert found is not None, "checked by Engine._pack"
        self.kernels = found
        self.layers = list(zip(self.description.layers, packed.products, strict=True))
        self.tables = self.description.rotary_tables(len(prefix) + capacity)
        self.slot = torch.arange(slots, dtype=torch.int32)  # of the row at each place
        self.vocabulary = vocabulary = len(packed.body.head)
        self.seen = torch.zeros(slots, vocabulary, dtype=torch.uint8)
        self.banned = torch.tensor(decoding.banned_ids, dtype=torch.int64)
        self.rule = c.RuleArguments(
            vocabulary,
            decoding.top_k,
            len(self.banned),
            decoding.greedy,
            decoding.temperature,
            decoding.top_p,
            decoding.repetition_penalty,
            packed.body.softcap or 0.0,
            self.banned.data_ptr(),
        )
        shared = _Cache(self.description, 1, len(prefix))
        if prefix:
            self.own, self.arguments = shared, self._arguments(shared, None, 0)
            for at in range(0, len(prefix), PREFILL_TOKENS):
                part = prefix[at : at + PREFILL_TOKENS]
                self._forward(part, torch.zeros(len(part), dtype=torch.int32), range(at, at + len(part)))
        self.own, self.shared = _Cache(self.description, slots, capacity), shared
        self.arguments = self._arguments(self.own, shared, len(prefix))

    def _arguments(self, own: _Cache, shared: _Cache | None, prefix: int) -> list[Any]:
        d, out = self.description, []
        for index, (layer, rule) in enumerate(zip(d.layers, self.packed.rules, strict=True)):
            cosine, sine = self.tables[layer.rope]
            norms = (None if x is None else x.data_ptr() for x in (layer.query_norm, layer.key_norm))
            sizes = (d.heads, d.kv_heads, d.width, cosine.shape[1], own.slots, own.capacity, prefix)
            ahead = (None, None) if shared is None or not prefix else shared.addresses(index)
            arguments = c.LayerArguments(
                *sizes,
                shared.capacity if shared else 0,
                rule.window or 0,
                rule.scaling,
                rule.softcap or 0.0,
                d.eps,
                cosine.data_ptr(),
                sine.data_ptr(),
                *norms,
                *own.addresses(index),
                *ahead,
            )
            out.append((arguments, ctypes.byref(arguments)))
        return out

    def _forward(self, ids: Sequence[int], slot: Tensor, at: Sequence[int]) -> Tensor:
        """(n, h) final states, normed, of tokens at positions ``at`` of ``slot`` (n,) int32."""
        d, k = self.description, self.kernels
        tokens, place = torch.tensor(ids, dtype=torch.int64), torch.tensor(at, dtype=torch.int32)
        n, h = len(ids), d.embedding.shape[1]
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(d.embedding):  # the kernel would read out of bounds
            raise IndexError(f"token ids must be in 0 to {len(d.embedding) - 1}")
        where = c.TokenArguments(slot.data_ptr(), place.data_ptr())
        by_reference = ctypes.byref(where)
        residual, x = (torch.empty(n, h, dtype=d.dtype) for _ in range(2))
        mixed = torch.empty(n, d.heads * d.width, dtype=d.dtype)
        active = torch.empty(n, d.layers[0].down.in_features, dtype=d.dtype)
        k.embed(d.embedding, tokens, d.embedding_scale, d.layers[0].before_attention, d.eps, residual, x)
        following = [layer.before_attention.data_ptr() for layer in d.layers[1:]] + [d.norm.data_ptr()]
        steps = zip(self.layers, self.arguments, following, strict=True)
        for (layer, (qkv, output, gate_up, down)), (_, arguments), norm in steps:
            post = None if layer.after_attention is None else layer.after_attention.data_ptr()
            last = None if layer.after_mlp is None else layer.after_mlp.data_ptr()
            k.attend(arguments, by_reference, qkv(x), mixed)
            k.add_norm(residual, output(mixed), post, layer.before_mlp.data_ptr(), d.eps, x)
            k.gate(gate_up(x), d.activation, active)
            k.add_norm(residual, down(active), last, norm, d.eps, x)
        return x

    def prefill(self, rows: Sequence[Sequence[int]], begin: int) -> Tensor:
        return self._pass([0] * len(rows), rows, begin)

    def _pass(self, begun: Sequence[int], rows: Sequence[Sequence[int]], begin: int) -> Tensor:
        """(n, h) final states at the last token of rows, which go on after ``begun`` tokens that are cached."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = [token for row in rows for token in row]
        at, _ = _each_token(begun, rows)
        slot = self.slot[begin : begin + len(rows)].repeat_interleave(lengths)
        ends, out = lengths.cumsum(0) - 1, []
        for start in range(0, len(ids), PREFILL_TOKENS):
            span = slice(start, start + PREFILL_TOKENS)
            states = self._forward(ids[span], slot[span], at[span])
            here = ends[(ends >= start) & (ends < start + PREFILL_TOKENS)]
            out.append(states[here - start])
        return torch.cat(out)

    def decode(self, lengths: Sequence[int], last: Sequence[int]) -> Tensor:
        return self._forward(last, self.slot[: len(last)], lengths)

    def extend(self, lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
        return self._pass(lengths, rows, 0)

    def see(self, begin: int, prompts: Sequence[Sequence[int]]) -> None:
        for slot, prompt in zip(self.slot[begin:].tolist(), prompts, strict=False):
            row = self.seen[slot]
            row.zero_()
            row[torch.tensor(prompt)] = 1

    def logits(self, states: Tensor) -> Tensor:
        logits, softcap = self._scores(states).float(), self.packed.body.softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def _scores(self, states: Tensor) -> Tensor:
        """(n, V) logits in the model's number format, before any soft cap."""
        scale = self.packed.body.logit_scale
        return self.packed.head(states * scale if scale != 1 else states)

    def choose(self, states: Tensor, places: Sequence[int], draws: Tensor, allowed: Tensor | None = None) -> list[int]:
        rule, slot = self.decoding, self.slot[list(places)]
        capped = allowed is not None and self.packed.body.softcap is not None  # the kernel would lift -inf to the cap
        if not capped and (rule.greedy or 0 < rule.top_k <= c.TOP_K):
            scores = only(self._scores(states), allowed)
            return self.kernels.sample(ctypes.byref(self.rule), scores, slot, self.seen, draws).tolist()
        chosen = choose(only(self.logits(states), allowed), self.seen[slot.long()].bool(), draws, rule)
        self.seen[slot.long(), chosen] = 1
        return chosen.tolist()

    def mark(self, places: Sequence[int], tokens: Sequence[int]) -> None:
        self.seen[self.slot[list(places)].long(), torch.tensor(tokens)] = 1

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copies nothing: the places change slots."""
        self.slot[[*sources, *targets]] = self.slot[[*targets, *sources]]


class _Cache:
    """Keys and values of all layers, in the layout of ``decode.c``.

    The system allocates memory page by page as rows grow: a slot's unused capacity costs nothing.
    """

    def __init__(self, description: Description, slots: int, capacity: int) -> None:
        d = description
        self.slots, self.capacity = slots, -(-capacity // c.LANES) * c.LANES
        self.layer = slots * d.kv_heads * self.capacity * d.width * d.dtype.itemsize  # bytes of keys, and of values
        size = 2 * self.layer * len(d.layers)
        self.memory = mmap.mmap(-1, size) if size else None
        self.address = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr() if self.memory else 0

    def addresses(self, index: int) -> tuple[int, int]:
        start = self.address + 2 * index * self.layer
        return start, start + self.layer
