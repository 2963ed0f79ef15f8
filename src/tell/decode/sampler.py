"""Next tokens from logits: repetition penalty, temperature, top-k and top-p in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tell.config_sections import GenerateConfig
from tell.train.device import send

WIDE = 512  # candidates sorted when only top-p limits them; the whole vocabulary if these are too few


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are sampled; the defaults are the paper's (temperature 0.3, top-k 20, top-p 0.7, penalty 1.05).

    Attributes:
        stop_ids: tokens that end an answer and are not part of it.
        banned_ids: tokens that are never sampled.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    greedy: bool = False
    temperature: float = 0.3
    top_k: int = 20
    top_p: float = 0.7
    repetition_penalty: float = 1.05
    batch_size: int = 32
    seed: int = 42
    banned_ids: tuple[int, ...] = field(default=())

    @classmethod
    def of(cls, config: GenerateConfig, *, max_new_tokens: int, stop_ids: tuple[int, ...], seed: int) -> Decoding:
        return cls(
            max_new_tokens=config.max_new_tokens or max_new_tokens,
            stop_ids=stop_ids,
            greedy=config.greedy,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            batch_size=config.batch_size,
            seed=seed,
        )


def uniforms(seed: int, row: int, n: int) -> np.ndarray:
    """(n,) numbers in [0, 1) of one row; they do not depend on the other rows of its batch."""
    return np.random.default_rng([seed, row]).random(n)


@lru_cache(maxsize=4)
def _indices(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Cached so that a GPU receives them once, not for each token."""
    return send(torch.tensor(ids, dtype=torch.long), device)


def choose(logits: Tensor, seen: Tensor, draws: Tensor, rule: Decoding) -> Tensor:
    """Next token of each row.

    Args:
        logits: (n, V) float32; changed in place.
        seen: (n, V) bool, tokens in prompt or answer so far.
        draws: (n,) float32 in [0, 1).

    Returns:
        (n,) int64.
    """
    if rule.repetition_penalty != 1:
        penalised = torch.where(logits > 0, logits / rule.repetition_penalty, logits * rule.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if rule.banned_ids:
        logits.index_fill_(1, _indices(rule.banned_ids, logits.device), float("-inf"))
    if rule.greedy:
        return logits.argmax(dim=-1)
    logits = logits / rule.temperature
    vocabulary = logits.shape[-1]
    if rule.top_k:
        top, ids = logits.topk(min(rule.top_k, vocabulary), dim=-1)
        probs = top.softmax(dim=-1)
    else:
        width = min(WIDE, vocabulary) if rule.top_p < 1 else vocabulary
        top, ids = logits.topk(width, dim=-1)
        probs = (top - logits.logsumexp(dim=-1, keepdim=True)).exp()
        if width < vocabulary and bool((probs.sum(dim=-1) < rule.top_p).any()):
            top, ids = logits.sort(dim=-1, descending=True)
            probs = top.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    probs = torch.where(before < rule.top_p, probs, 0.0)  # the first candidate always remains
    cumulative = probs.cumsum(dim=-1)
    target = draws[:, None] * cumulative[:, -1:]
    at = (cumulative <= target).sum(dim=-1, keepdim=True)
    at = at.minimum((probs > 0).sum(dim=-1, keepdim=True) - 1)  # a draw rounded up to 1 takes the last remaining one
    return ids.gather(1, at)[:, 0]
