"""How sure a readout is of answers: the weights of pseudo-labelled rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tell.readout.readout import Readout


def confidence(readout: Readout, states: np.ndarray, answers: Sequence[str]) -> np.ndarray:
    """(n,) the probability that the readout gives to an answer's closed fields, as a mean over fields, in (0, 1].

    The mean is geometric. A product would shrink with the number of fields, so that rows of a task with many of them
    would hardly count next to its labelled rows, however sure the readout is of each. Of a list it is over the values
    that may be in it: that each is there, or is not. Fields whose readout tells no more than the shares of their values
    do not count.

    Args:
        states: (n, poolings, d) of the prompts, as `Readout.scores` takes them.
        answers: n answers.

    Returns:
        NaN for an answer without such a field.
    """
    logs: list[list[float]] = [[] for _ in answers]
    for field, scores in zip(readout.fields, readout.scores(states), strict=True):
        if not field.informed:
            continue
        held, fails = field.calibration.log_probs(scores)
        for i, answer in enumerate(answers):
            if (target := field.field.target(answer)) is None:
                continue
            there = target > 0
            chosen = np.where(there, held[i], fails[i]) if field.field.is_set else held[i][there]
            logs[i].append(float(chosen.mean()))
    return np.array([np.exp(np.mean(found)) if found else np.nan for found in logs])
