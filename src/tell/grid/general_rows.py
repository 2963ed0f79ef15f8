"""Losses on general text row by row, so that arms of several runs are compared on the same rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tell.run import RunFolder, read_jsonl

CHANGE = " change"  # of a number, from the untuned model on the same rows


@dataclass(frozen=True)
class GeneralRows:
    """Losses on the rows of one general set, or their changes.

    Attributes:
        source: name of the set; equal hashes of one set are one row.
        hashes: (n,) content hashes.
        losses: (n,) in nats a token.
    """

    source: str
    hashes: np.ndarray
    losses: np.ndarray


def read_general_rows(folder: RunFolder, weights: str) -> dict[str, GeneralRows]:
    """What a run measured under some weights (``base`` or an arm's), by set; empty where it has kept no rows."""
    path = folder.general_losses(weights)
    by_set: dict[str, list[dict]] = {}
    for row in read_jsonl(path) if path.is_file() else []:
        by_set.setdefault(row["set"], []).append(row)
    return {
        name: GeneralRows(name, np.array([r["hash"] for r in rows]), np.array([float(r["loss"]) for r in rows]))
        for name, rows in by_set.items()
    }


def levels_and_changes(own: GeneralRows | None, base: GeneralRows | None) -> dict[str, GeneralRows]:
    """The rows as they are and, where the untuned model was measured on the same ones, as changes."""
    if own is None:
        return {}
    found = {"": own}
    if base is not None and np.array_equal(own.hashes, base.hashes):
        found[CHANGE] = replace(own, losses=own.losses - base.losses)
    return found
