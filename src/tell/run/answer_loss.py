"""Answer loss: how likely a model finds the reference answers, a continuous complement to right-or-wrong scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tell.data.example import Example
from tell.metric_names import ANSWER_LOSS
from tell.rows.row_table import RowTable
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, tokenize
from tell.run.session import Session
from tell.score.means import mean_metric
from tell.score.scored import Metric

ANY_LENGTH = np.iinfo(np.int32).max


def answer_loss_metric(values: Sequence[float] | np.ndarray) -> dict[str, Metric]:
    """The metric by its name; ``values`` (n,) in nats a token, NaN where a row has none."""
    return {ANSWER_LOSS: mean_metric(np.round(values, 6))}  # as stored in rows, so that the mean can be reproduced


def kept_answer_losses(rows: Sequence[dict]) -> np.ndarray | None:
    """(n,) answer losses in rows of ``predictions/<arm>.jsonl``; None where no row has one."""
    values = np.array([row.get("scores", {}).get(ANSWER_LOSS, np.nan) for row in rows], dtype=np.float64)
    return values if np.isfinite(values).any() else None


def answer_losses(
    session: Session, prompts: Sequence[Sequence[int]], test: Sequence[Example], *, title: str
) -> np.ndarray:
    """(n,) mean nll, in nats a token, of each reference answer with its end of turn.

    Args:
        session: with the arm's adapter applied.
        prompts: the arm's own, token ids.
        test: n examples, one for each prompt.

    Returns:
        NaN where the reference is empty, or prompt and answer together are longer than the model's positions.
    """
    answers = answer_ids(session.chat, test)
    room = session.files.architecture.max_positions or ANY_LENGTH
    fits = [i for i, e in enumerate(test) if e.hash in answers and len(prompts[i]) + len(answers[e.hash]) <= room]
    values = np.full(len(test), np.nan)
    if fits:
        table = _table([(prompts[i], answers[test[i].hash]) for i in fits], [test[i] for i in fits])
        with session.display.bar(title, len(fits)) as advance:
            values[fits] = session.row_losses(table, advance)
    return values


def answer_ids(chat: ChatTokenizer, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Token ids of each last answer as training would see it, end of turn included, by content hash.

    Without the anchor: an answer's ids are the same behind any prompt. Examples with an empty answer are left out.
    """
    rules = RowRules(ANY_LENGTH, "drop", "drop", misfit="drop")
    table = tokenize([e for e in examples if e.answer.strip()], chat, source="test", rules=rules)
    found = {}
    for i, key in enumerate(table.hashes):
        ids, mask = table.row(i)
        trained = np.flatnonzero(mask)
        first = trained[np.flatnonzero(np.diff(trained) > 1)[-1] + 1] if (np.diff(trained) > 1).any() else trained[0]
        found[str(key)] = ids[first : trained[-1] + 1]
    return found


def _table(rows: Sequence[tuple[Sequence[int], np.ndarray]], examples: Sequence[Example]) -> RowTable:
    """Token rows of prompts and answers; only the answers count in the loss."""
    tokens = np.array([len(prompt) + len(answer) for prompt, answer in rows], dtype=np.int32)
    trained = np.array([len(answer) for _, answer in rows], dtype=np.int32)
    return RowTable(
        source="test",
        hashes=np.array([e.hash for e in examples]),
        origins=np.array([e.origin for e in examples]),
        tokens=tokens,
        trained=trained,
        unit=tokens,
        ids=np.concatenate([np.asarray(part, dtype=np.int32) for row in rows for part in row]),
        mask=np.repeat(np.tile([False, True], len(rows)), np.stack([tokens - trained, trained], axis=1).ravel()),
        starts=np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)]),
    )
