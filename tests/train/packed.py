"""Tiny models, rows and plain transformers references for the tests of training and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tell.rows.row_table import RowTable
from tell.train.fast.cuda import VarlenPlan
from tell.train.packing import TrainRow

torch.set_num_threads(1)


def load(folder: Path, *, attention: str = "eager", dtype: torch.dtype = torch.float32):
    """A frozen model on transformers' own attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def make_rows(lengths: Sequence[int], *, prefix: int = 0, seed: int = 0, task: Sequence[int] = ()) -> list[TrainRow]:
    """Random rows of the tiny vocabulary that begin with the same ``prefix`` tokens; answers of uneven lengths."""
    rng = np.random.default_rng(seed)
    head = rng.integers(10, 300, prefix)
    rows = []
    for i, length in enumerate(lengths):
        ids = np.concatenate([head, rng.integers(10, 300, length - prefix)]).astype(np.int32)
        mask = np.zeros(length, dtype=bool)
        mask[length - 1 - rng.integers(0, length - 1) :] = True
        mask[0] = False
        rows.append(TrainRow(ids, mask, int(i not in task), i in task))
    return rows


def make_table(rows: Sequence[TrainRow], source: str) -> RowTable:
    """A table of given rows."""
    tokens = np.array([len(row.ids) for row in rows], dtype=np.int32)
    return RowTable(
        source=source,
        hashes=np.array([f"{source[0]}{i:015x}" for i in range(len(rows))], dtype="U16"),
        origins=np.array([f"{source}.jsonl:{i + 1}" for i in range(len(rows))], dtype=str),
        tokens=tokens,
        trained=np.array([row.mask.sum() for row in rows], dtype=np.int32),
        unit=tokens,
        ids=np.concatenate([row.ids for row in rows]),
        mask=np.concatenate([row.mask for row in rows]),
        starts=np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)]),
    )


def reference_loss(model, rows: Sequence[TrainRow], *, normalization: str, task_weight: float = 1.0) -> torch.Tensor:
    """The step's loss as plain transformers gives it: one row at a time, its own forward and its own labels loss."""
    weights = [task_weight if row.task else 1.0 for row in rows]
    counts = [int(row.mask.sum()) for row in rows]
    total = sum(weights) if normalization == "example" else sum(w * n for w, n in zip(weights, counts, strict=True))
    loss = torch.zeros(())
    for row, weight, count in zip(rows, weights, counts, strict=True):
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(row.mask)[None], -100)
        mean = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss = loss + mean * weight * (1 if normalization == "example" else count) / total
    return loss


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def wake(model, seed: int = 5) -> None:
    """Random LoRA B matrices: at their zero start A would get no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Equal names, and each tensor within ``tolerance`` of its own size."""
    assert ours.keys() == theirs.keys() and ours
    for name, value in theirs.items():
        size = value.norm()
        assert size > 0, name
        assert (ours[name] - value).norm() <= tolerance * size, (name, float((ours[name] - value).norm() / size))


class Fetches(TorchDispatchMode):
    """Counts operations that compute, and names those for which a GPU would have to be waited for."""

    paused = False
    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        views = (x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        self.operations += not any(views)
        if name.startswith(self.WAITING) and not self.paused:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def reference_varlen(query, key, value, sequences, scale, left):
    """Variable-length attention by its definition, one sequence at a time; the signature of ``Varlen``.

    As on a GPU, sequences may be empty, the longest may be shorter than said, and what belongs to none has neither
    output nor gradient: here it is NaN.
    """
    ends_q, ends_k, longest_q, longest_k = sequences
    for ends, x, longest in ((ends_q, query, longest_q), (ends_k, key, longest_k)):
        assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] <= len(x) and ends.diff().max() <= longest
    group, out = query.shape[1] // key.shape[1], []
    covered = int(ends_k[-1])
    key, value = (_Unwritten.apply(x, covered) for x in (key, value))
    for q, k, v in zip(
        query.tensor_split(ends_q[1:].long()), *(x.tensor_split(ends_k[1:].long()) for x in (key, value)), strict=True
    ):
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        at = torch.arange(len(q))[:, None] + len(k) - len(q)  # the last query is at the last key
        keys = torch.arange(len(k))[None]
        hidden = keys > at
        if left >= 0:
            hidden |= keys < at - left
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v))
    out[-1] = torch.full_like(out[-1], torch.nan)
    return torch.cat(out)


class _Unwritten(torch.autograd.Function):
    """x, and a gradient that is NaN from the index ``covered`` on."""

    @staticmethod
    def forward(ctx, x, covered):
        ctx.covered = covered
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.covered :] = torch.nan
        return grad, None


def unseen_varlen(*args):
    """The reference looks at its indices, which flash attention leaves on the device."""
    Fetches.paused = True
    try:
        return reference_varlen(*args)
    finally:
        Fetches.paused = False


def varlen_plan(lengths, *, prefix=0, ahead=None, device="cpu"):
    return VarlenPlan(lengths, prefix=prefix, ahead=ahead, device=device, find=lambda q, v: unseen_varlen)
