"""Keys and values of rows being decoded: one shared prefix, then a slot for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from tell.train.attention import PackedPlan, Rule
from tell.train.block_attention import softmax_scores
from tell.train.device import send
from tell.train.fast.cuda import Sequences, Varlen, VarlenPlan, find_varlen

Call = tuple[nn.Module | None, int]  # attention module and number of its call in the pass: DiffLlama calls each twice


class Calls:
    """Numbers the calls of each module in one pass."""

    def __init__(self) -> None:
        self._made: dict[nn.Module | None, int] = {}

    def next(self, layer: nn.Module | None) -> Call:
        made = self._made[layer] = self._made.get(layer, -1) + 1
        return layer, made


class Store:
    """Cached keys and values, layer by layer.

    Slots 0 to ``active - 1`` are in use: the last row takes the slot of a finished one, so every product runs over one
    contiguous block.

    Args:
        slots: rows decoded at once.
        capacity: tokens of a slot after the shared prefix.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.prefix: dict[Call, tuple[Tensor, Tensor]] = {}  # (1, Hk, P, D) twice
        self.own: dict[Call, tuple[Tensor, Tensor]] = {}  # (slots, Hk, capacity, D) twice

    def slot_tensors(self, call: Call, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of an attention call; allocated at its first call."""
        if call not in self.own:
            self.own[call] = tuple(  # type: ignore[assignment]
                torch.zeros(self.slots, x.shape[1], self.capacity, x.shape[3], dtype=x.dtype, device=x.device)
                for x in (key, value)
            )
        return self.own[call]

    def put(self, call: Call, key: Tensor, value: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Write keys and values (1, Hk, T, D) of a module's call to their places; its slots."""
        slots = self.slot_tensors(call, key, value)
        index = places.of(key.shape[1], self.capacity)
        for own, x in zip(slots, (key, value), strict=True):
            own.view(-1, x.shape[3]).index_copy_(0, index, x[0].transpose(0, 1).reshape(-1, x.shape[3]))
        return slots

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first ``length`` tokens of some slots over others."""
        for pair in self.own.values():
            for own in pair:
                seen = own[:, :, :length]
                seen.index_copy_(0, targets, seen.index_select(0, sources))


class Places:
    """Where T tokens go in the store: (T,) slot of each and (T,) position in it."""

    def __init__(self, slots: Tensor, at: Tensor) -> None:
        self.slots, self.at = slots, at
        self._index: dict[int, Tensor] = {}

    def of(self, heads: int, capacity: int) -> Tensor:
        """(T * heads,) index into slots x heads x capacity, heads of a token together."""
        if heads not in self._index:
            head = torch.arange(heads, device=self.at.device)[None]
            self._index[heads] = ((self.slots[:, None] * heads + head) * capacity + self.at[:, None]).flatten()
        return self._index[heads]


class PrefixPlan(VarlenPlan):
    """One pass over the shared prefix alone; its keys and values are kept."""

    def __init__(self, length: int, store: Store, device: torch.device | str) -> None:
        super().__init__([length], device=device)
        self.store, self.calls = store, Calls()

    def attend(self, layer: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        self.store.prefix[self.calls.next(layer)] = (key, value)
        return super().attend(layer, query, key, value, rule)


class PrefillPlan(PackedPlan):
    """Rows' own tokens, packed, after the stored prefix; keys and values go to the rows' slots.

    Args:
        find: the variable-length attention of a GPU, or None for padded blocks, as in ``VarlenPlan``.
    """

    def __init__(
        self,
        lengths: list[int],
        slots: list[int],
        store: Store,
        prefix: int,
        device: torch.device | str,
        find: Callable[[Tensor, Tensor], Varlen | None] = find_varlen,
    ) -> None:
        super().__init__(lengths, device=device)
        self.find = find
        self.store, self.stored = store, prefix
        self._shares = [prefix] * len(self._blocks)  # which is stored, not packed
        at = np.concatenate([np.arange(length) for length in lengths])
        self.places = Places(*(send(torch.from_numpy(x), device) for x in (np.repeat(slots, lengths), at)))
        self.calls = Calls()

    def positions(self) -> Tensor:
        return super().positions() + self.stored

    @cached_property
    def _sequences(self) -> tuple[Sequences, Tensor]:
        """Rows as sequences, and the key of each, the prefix before each row's own, in prefix and own tokens packed."""
        own, ahead = np.array(self.lengths, dtype=np.int64), np.arange(self.stored)
        ends = [np.concatenate([[0], x.cumsum()]).astype(np.int32) for x in (own, own + self.stored)]
        stops = self.stored + own.cumsum()
        pieces = [piece for stop, n in zip(stops, own, strict=True) for piece in (ahead, np.arange(stop - n, stop))]
        first, second, index = (send(torch.from_numpy(x), self.device) for x in (*ends, np.concatenate(pieces)))
        return Sequences(first, second, int(own.max()), int(own.max()) + self.stored), index

    def attend(self, layer: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        call = self.calls.next(layer)
        self.store.put(call, key, value, self.places)
        kp, vp = self.store.prefix.get(call, (None, None))
        varlen = self.find(query, value) if rule.softcap is None else None
        if varlen is not None:
            ends, index = self._sequences
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            if kp is not None and vp is not None:
                k, v = (torch.cat([p[0].transpose(0, 1), x]).index_select(0, index) for p, x in ((kp, k), (vp, v)))
            left = -1 if rule.window is None or rule.window >= ends.longest_k else rule.window - 1
            return varlen(q, k, v, ends, rule.scaling, left)[None]
        q, k, v = (self._pad(x) for x in (query * rule.scaling, key, value))
        return torch.cat(list(self._attend_rows((q, k, v), kp, vp, rule))).index_select(0, self.indices[1])[None]


class DecodePlan:
    """One new token for each of the first n slots, or n tokens for given ones.

    Args:
        lengths: (n,) tokens in each slot, after the prefix, that come before the new one.
        prefix: tokens of the shared prefix.
        slots: (n,) of each token, where some have several.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        store: Store,
        prefix: int,
        device: torch.device | str,
        slots: Sequence[int] | None = None,
    ) -> None:
        self.longest = max(lengths) + 1  # on the CPU, without waiting for a GPU
        self.lengths, self.store, self.prefix = send(torch.tensor(lengths), device), store, prefix
        self.calls = Calls()
        self.slots = None if slots is None else send(torch.tensor(slots), device)
        first = torch.arange(len(lengths), device=self.lengths.device) if self.slots is None else self.slots
        self.places = Places(first, self.lengths)
        self._hidden: dict[int | None, Tensor] = {}

    def positions(self) -> Tensor:
        return (self.lengths + self.prefix)[None]

    def hidden(self, window: int | None) -> Tensor:
        """(n, 1, 1, prefix + longest) True where a key is masked."""
        if window is not None and window >= self.prefix + self.longest:
            window = None
        if window not in self._hidden:
            k = torch.arange(self.longest, device=self.lengths.device)[None]
            out = k > self.lengths[:, None]
            if self.prefix:
                out = torch.cat([out.new_zeros(len(out), self.prefix), out], dim=1)
            if window is not None:
                q = (self.lengths + self.prefix)[:, None]
                out = out | (torch.arange(self.prefix + self.longest, device=q.device)[None] <= q - window)
            self._hidden[window] = out[:, None, None]
        return self._hidden[window]

    def attend(self, layer: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        n, heads, width = len(self.lengths), query.shape[1], query.shape[3]
        call = self.calls.next(layer)
        keys, values = self.store.put(call, key, value, self.places)
        kv = key.shape[1]
        if self.slots is None:
            k, v = keys[:n, :, : self.longest], values[:n, :, : self.longest]
        else:  # copied for each token: a pass over several tokens a row is rare and short
            k, v = (x[:, :, : self.longest].index_select(0, self.slots) for x in (keys, values))
        q = (query[0].transpose(0, 1) * rule.scaling).reshape(n, kv, heads // kv, width)
        scores = q @ k.transpose(2, 3)
        if self.prefix:
            kp, vp = self.store.prefix[call]
            shared = q.transpose(0, 1).reshape(kv, -1, width)  # all rows share these keys: one product per head
            ahead = (shared @ kp[0].transpose(1, 2)).view(kv, n, heads // kv, self.prefix).transpose(0, 1)
            scores = torch.cat([ahead, scores], dim=-1)
        probs = softmax_scores(scores, rule, self.hidden(rule.window))
        if not self.prefix:
            return (probs @ v).reshape(1, n, heads, width)
        ahead = probs[..., : self.prefix].transpose(0, 1).reshape(kv, -1, self.prefix) @ vp[0]
        out = ahead.view(kv, n, heads // kv, -1).transpose(0, 1) + probs[..., self.prefix :] @ v
        return out.reshape(1, n, heads, -1)
