"""Seeded synthetic rows and prompts. Imports no torch: environments of peers read them too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TASK_SHARE = 20  # one row in so many is a task row
TASK_TOKENS, ANCHOR_TOKENS, GENERAL_TOKENS = 560, 280, 110
LONGEST_GENERAL = 512
DECODE_PREFIX, DECODE_OWN, DECODE_NEW, DECODE_MOST = 300, 60, 64, 192


@dataclass(frozen=True, slots=True)
class Rows:
    """n training rows.

    Attributes:
        ids: (sum of lengths,) int32, rows end to end.
        starts: (n + 1,) int64, row i is ``ids[starts[i]:starts[i + 1]]``.
        prompts: (n,) int32, tokens before the trained answer.
        task: (n,) bool, rows that begin with the shared anchor.
    """

    ids: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray
    task: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each row."""
        return np.diff(self.starts)

    @property
    def trained(self) -> np.ndarray:
        """(n,) tokens of each row that carry loss."""
        return self.lengths - self.prompts

    def row(self, i: int) -> tuple[np.ndarray, int]:
        """(ids, tokens of the prompt) of row i."""
        return self.ids[self.starts[i] : self.starts[i + 1]], int(self.prompts[i])

    def labels(self, i: int) -> list[int]:
        """Targets of row i as peers want them, -100 where nothing is trained."""
        ids, prompt = self.row(i)
        return [-100] * prompt + ids[prompt:].tolist()

    def save(self, path: Path) -> None:
        np.savez(path, ids=self.ids, starts=self.starts, prompts=self.prompts, task=self.task)

    @classmethod
    def load(cls, path: Path | str) -> Rows:
        with np.load(path) as file:
            return cls(file["ids"], file["starts"], file["prompts"], file["task"])


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to answer: token ids, and how many tokens each answer has."""

    ids: list[list[int]]
    limits: list[int]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"ids": self.ids, "limits": self.limits}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Prompts:
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def row_lengths(n: int, rng: np.random.Generator, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """((n,) tokens, (n,) bool task) of the mixture: 5 % near 560, the rest log-normal with median 110, at most 512.

    Every 20 consecutive rows hold exactly one task row, so that steps are alike. ``scale`` shrinks all lengths.
    """
    task = np.zeros(n, dtype=bool)
    for begin in range(0, n, TASK_SHARE):
        at = begin + int(rng.integers(TASK_SHARE))
        if at < n:
            task[at] = True
    general = np.clip(rng.lognormal(np.log(GENERAL_TOKENS), 0.5, n), 16, LONGEST_GENERAL)
    long = rng.normal(TASK_TOKENS, 20, n).clip(TASK_TOKENS - 60, TASK_TOKENS + 60)
    lengths = np.round(np.where(task, long, general) * scale).astype(np.int64)
    return np.maximum(lengths, np.where(task, round(ANCHOR_TOKENS * scale) + 4, 4)), task


def make_rows(n: int, vocabulary: np.ndarray, seed: int, scale: float = 1.0) -> Rows:
    """n rows of random tokens, about half of each trained; task rows begin with the same anchor.

    Args:
        vocabulary: (v,) ids to draw from, see `plain_tokens`.
        seed: same seed, same rows, whatever comes after row n.
        scale: of all lengths.
    """
    rng = np.random.default_rng([seed, 1])
    lengths, task = row_lengths(n, rng, scale)
    anchor = rng.choice(vocabulary, round(ANCHOR_TOKENS * scale))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.choice(vocabulary, int(starts[-1])).astype(np.int32)
    share = rng.uniform(0.35, 0.65, n)
    prompts = np.clip(np.round(lengths * share), 1, lengths - 1).astype(np.int32)
    for i in np.flatnonzero(task):
        ids[starts[i] : starts[i] + len(anchor)] = anchor
        prompts[i] = min(max(prompts[i], len(anchor)), lengths[i] - 1)
    return Rows(ids, starts, prompts, task)


def make_prompts(n: int, vocabulary: np.ndarray, seed: int, scale: float = 1.0) -> Prompts:
    """n prompts: a prefix of 300 tokens that all share, own parts around 60, answers around 64 and at most 192."""
    rng = np.random.default_rng([seed, 2])
    prefix = rng.choice(vocabulary, max(2, round(DECODE_PREFIX * scale))).tolist()
    own = np.clip(rng.lognormal(np.log(DECODE_OWN), 0.5, n) * scale, 2, None).round().astype(int)
    limits = np.clip(rng.lognormal(np.log(DECODE_NEW), 0.6, n), 4, DECODE_MOST) * scale
    limits = limits.round().astype(int).clip(2, None)
    return Prompts([prefix + rng.choice(vocabulary, k).tolist() for k in own], limits.tolist())


def plain_tokens(model: Path) -> np.ndarray:
    """Ids of the model's vocabulary that are no special tokens.

    Args:
        model: folder with ``tokenizer.json``.
    """
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((t[0], i) for i, t in enumerate(vocabulary))
    special = {token["id"] for token in tokenizer.get("added_tokens", [])}
    return np.array(sorted({i for _, i in pairs} - special), dtype=np.int32)


def order_rows(lengths: np.ndarray, batch: int, turns: list[int], how: str) -> list[int]:
    """Row numbers in the order an engine is fed.

    Args:
        lengths: (n,) tokens of each row.
        batch: rows of a step.
        turns: steps of each turn, warm-up included; together they use the rows from 0 on.
        how: ``given``; ``step``: by length inside each step, so that small micro-batches pad less; ``turn``: by
            length inside each turn, which is what ``group_by_length`` does with the turn as its mega-batch. A turn
            holds the same rows in all three.
    """
    sizes = [batch] * sum(turns) if how == "step" else [batch * steps for steps in turns]
    order: list[int] = []
    for size in sizes:
        part = range(len(order), len(order) + size)
        order += part if how == "given" else sorted(part, key=lambda i: -int(lengths[i]))
    return order
