"""Hidden states of prompts at any layer, general queries to compare them with, and the numbers of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.anchor.separation import Separation, jackknife_error
from tell.config import Config
from tell.data.example import Example
from tell.data.general import given_rows, is_given
from tell.errors import TellError
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import CHUNK, prompt_ids
from tell.run.task import Task
from tell.score.intervals import Z, estimate, estimate_from
from tell.score.means import mean_metric
from tell.score.probe import load_probe
from tell.seeds import permutation

QUERIES = 50
QUERY_TOKENS = 400  # of a general row, to estimate how much of a named set is needed


def layer_numbers(layer: str, layers: int) -> list[int]:
    """The layers that ``middle``, ``all`` or a number names, in a model of so many blocks; 0 is the embedding.

    Raises:
        TellError: no such layer.
    """
    if layer == "all":
        return list(range(layers + 1))
    if layer == "middle":
        return [layers // 2]
    if layer.isdecimal() and int(layer) <= layers:
        return [int(layer)]
    raise TellError(f"no layer {layer!r}", where="--layer", remedy=f"Use 0 to {layers}, middle or all.")


def general_queries(
    task: Task, *, most: int, anchor: Anchor = NO_ANCHOR, lengths: Sequence[int] | None = None
) -> list[Example]:
    """At most so many rows of the general source, drawn by seed, that fit into the context with the anchor.

    Without a source they are the general probe's, of which there are 64.

    Args:
        lengths: (most,) tokens of prompts; each takes the row nearest to it in length that is not taken yet.
    """
    config = task.config
    general = config.general
    rows = given_rows(general, most * QUERY_TOKENS).examples if is_given(general) else load_probe()
    rows = [rows[int(i)] for i in permutation(len(rows), config.seed, "separate", "general")]
    positions = task.files.architecture.max_positions or 10**9
    if lengths is None:
        fitting = (e for e in rows if _prompt_length(task.chat, e, anchor) < positions)
        return [e for _, e in zip(range(most), fitting, strict=False)]
    tokens = np.empty(len(rows))
    with task.display.bar("lengths of general queries", len(rows)) as advance:
        for begin in range(0, len(rows), CHUNK):
            texts = [_prompt_text(task.chat, e) for e in rows[begin : begin + CHUNK]]
            encoded = task.chat.backend.encode_batch_fast([text or "" for text in texts], add_special_tokens=False)
            lost = [np.inf if text is None else 0 for text in texts]
            tokens[begin : begin + CHUNK] = np.array([len(ids) for ids in encoded]) + lost
            advance(len(texts))
    first = int(np.argmin(tokens))
    added = _prompt_length(task.chat, rows[first], anchor) - tokens[first]
    tokens[tokens + added >= positions] = np.inf
    chosen: list[Example] = []
    for length in lengths[: min(most, int(np.isfinite(tokens).sum()))]:
        nearest = int(np.argmin(np.abs(tokens - length)))
        chosen.append(rows[nearest])
        tokens[nearest] = np.inf
    return chosen


def separation_numbers(found: Separation, config: Config) -> dict:
    """Probe accuracy, silhouette and MMD^2 with 95 % intervals."""
    low, high = found.mmd2_ci
    return {
        "probe": share(found.hits, config),
        "silhouette": jackknifed(found.silhouettes.mean(), found.silhouettes_without),
        "mmd2": {
            "value": round(found.mmd2, 6),
            "ci": [round(low, 6), round(high, 6)],
            "p": round(found.p, 6),
            "n": len(found.hits),
        },
    }


def jackknifed(value: float, without: np.ndarray) -> dict:
    """A statistic of two groups, with its interval from (2n,) its values with each row left out."""
    error = Z * jackknife_error(without)
    return estimate_from(float(value), float(value) - error, float(value) + error, len(without))


def share(hits: np.ndarray, config: Config) -> dict:
    """The share of (rows,) zeros and ones, with Wilson's interval."""
    return estimate(mean_metric(hits, binary=True), seed=config.seed, samples=config.eval.bootstrap)


def _prompt_text(chat: ChatTokenizer, example: Example) -> str | None:
    """The rendered prompt; None where the template refuses it, as it may refuse a general row."""
    try:
        return chat.render(example.asked, add_generation_prompt=True)
    except TellError:
        return None


def _prompt_length(chat: ChatTokenizer, example: Example, anchor: Anchor) -> float:
    """Number of tokens of a prompt; infinite where the template refuses it."""
    try:
        return len(prompt_ids(chat, example, anchor))
    except TellError:
        return np.inf
