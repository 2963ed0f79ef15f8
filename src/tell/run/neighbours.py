"""Training rows that are most similar to each test row, to be shown in its prompt (``eval.icl_select: nearest``).

Similar examples in context answer better than random ones (arXiv 2101.06804).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tell.data.example import Example
from tell.errors import TellError
from tell.names import ARMS
from tell.rows.tokenize import prompt_ids
from tell.run.readouts import STATES, prompt_states
from tell.run.session import Session


def nearest_rows(
    session: Session, arms: Iterable[str], test: Sequence[Example], train: Sequence[Example]
) -> np.ndarray | None:
    """(n, k) indices of the training rows whose prompts are most similar to each test prompt, the most similar first.

    None where no arm is shown any, or ``eval.icl_select`` is random. Similarity is the cosine of the prompts' hidden
    states (mean over the tokens, without the anchor, of the layers that the readout reads), each dimension
    standardised over the training rows. Equal ones keep the order of the file.

    Args:
        session: the untuned model's weights are to be applied.
        train: those longer than ``train.max_length`` are not shown; k is ``eval.icl_examples`` at most.

    Raises:
        TellError: no training row is short enough.
    """
    config = session.config
    if config.eval.icl_select == "random" or not any(ARMS[arm].in_context for arm in arms) or not test:
        return None
    limit = config.train.max_length
    fitting = [i for i, row in enumerate(train) if len(prompt_ids(session.chat, row)) <= limit]
    if not fitting:
        raise TellError(
            f"none of {len(train)} training prompts has {limit:,} tokens or fewer",
            where="eval.icl_select",
            remedy="Raise train.max_length, or set eval.icl_select=random.",
        )
    rows = [train[i] for i in fitting]
    states = prompt_states(session, [*rows, *test], "hidden states of prompts to compare")[:, STATES.index("mean")]
    order = most_similar(states[: len(rows)], states[len(rows) :])[:, : config.eval.icl_examples]
    return np.array(fitting)[order]


def most_similar(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(q, n) indices of rows by falling cosine with each query.

    Args:
        rows: (n, d); each dimension is standardised by their mean and deviation, and left out where all are alike.
        queries: (q, d).
    """
    rows, queries = rows.astype(np.float64), queries.astype(np.float64)
    mean, deviation = rows.mean(0), rows.std(0)
    scale = np.where(deviation > 1e-9 * np.abs(mean), deviation, np.inf)

    def unit(states: np.ndarray) -> np.ndarray:
        standard = (states - mean) / scale
        return standard / np.maximum(np.linalg.norm(standard, axis=1, keepdims=True), 1e-12)

    return np.argsort(-(unit(queries) @ unit(rows).T), axis=1, kind="stable")
