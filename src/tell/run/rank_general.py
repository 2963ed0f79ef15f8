"""Ranks general rows by their nearness to the task rows, by the untuned model's states (``general.select: similar``).

Nearness is the cosine of the mean hidden states of two prompts, at the layers that the readout takes; the order is that
of `nearest_order` (cross-task nearest neighbours, arXiv 2212.00196).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tell.errors import TellError
from tell.files import atomic_path
from tell.folder import RunFolder
from tell.home import tell_home
from tell.mix.amount import drawing_order
from tell.mix.nearest import cosine_similarity, nearest_order
from tell.readout.readout import readout_layers
from tell.rows.row_table import RowTable
from tell.rows.tokenize import prompt_ids
from tell.run.general_rows import General
from tell.run.known_ranking import (
    cached_ranking,
    candidates,
    needs_ranking,
    queries,
    ranking_key,
    read_ranking,
    states_key,
)
from tell.run.prepare import Writer
from tell.run.readouts import STATES, prompt_states
from tell.run.recast_rows import with_recast
from tell.run.session import Session
from tell.run.task import Task

BLOCK = 1024  # general rows whose states are saved at once: what a stopped run has to compute again at most


def ranked_by(session: Session, folder: RunFolder, general: General | Writer) -> Writer:
    """Supplies the general rows with their ranking, where a requested arm draws the nearest.

    A ranking is kept in the run's folder, so that a resumed run draws the same rows even where the cache is gone.
    """

    def write(task: Task, table: RowTable) -> General | None:
        found = general(task, table) if callable(general) else general
        if found is not None:
            found = with_recast(task, found)  # recast rows count, so they decide whether all rows are drawn
        if found is None or not needs_ranking(task, table, found):
            return found
        key = ranking_key(task, table, found)
        cached = cached_ranking(key)
        ranking = read_ranking(folder.nearest, key, found)
        if ranking is None:
            ranking = read_ranking(cached, key, found)
        if ranking is None:
            ranking = rank_general(task, table, found, session)
            _try_to_save(cached, partial(np.savez, order=ranking, key=key))
        with atomic_path(folder.nearest) as temporary, temporary.open("wb") as file:
            np.savez(file, order=ranking, key=key)
        _add_notices(task, table, found)
        return replace(found, ranking=ranking)

    return write


def rank_general(task: Task, table: RowTable, general: General, session: Session) -> np.ndarray:
    """(m,) `General.allowed`, nearest to the task rows first; rows that are not compared come last, as drawn by seed.

    Raises:
        TellError: the states are not finite.
    """
    known, made = queries(task, table), candidates(task, general)
    rows = np.intersect1d(made, general.allowed)
    session.load()
    asked = prompt_states(session, known, "hidden states of the task rows")[:, STATES.index("mean")]
    states = _general_states(task, general, made, session)[np.searchsorted(made, rows)]
    similarity = cosine_similarity(asked, states)
    if not np.isfinite(similarity).all():
        raise TellError(
            "the hidden states of some prompts are not finite",
            where="general.select",
            remedy="Set general.select: random, or model.dtype: fp32.",
        )
    session.check()
    near = rows[nearest_order(similarity)]
    drawn = general.allowed[drawing_order(len(general.allowed), task.config.seed)]
    return np.concatenate([near, drawn[~np.isin(drawn, near)]])


def _general_states(task: Task, general: General, rows: np.ndarray, session: Session) -> np.ndarray:
    """(k, d) mean states of the prompts of some general rows, saved block by block."""
    from tell.train.states import hidden_states

    layers = readout_layers(task.files.architecture.layers)
    names = general.table.hashes[rows].tolist()
    folder = tell_home() / "states" / states_key(task, names)
    micro = task.config.train.forward_tokens
    texts = general.examples(task.chat)
    parts: list[np.ndarray] = []
    with session.display.bar("hidden states of the general rows", len(names)) as advance:

        def moved(count: int) -> None:
            advance(count)
            session.check()

        for start in range(0, len(names), BLOCK):
            block, path = names[start : start + BLOCK], folder / f"{start}.npy"
            if (part := _read_states(path, len(block))) is None:
                prompts = [prompt_ids(task.chat, texts[name]) for name in block]
                found = hidden_states(
                    session.model, prompts, layers, states=("mean",), micro_tokens=micro, progress=moved
                )
                part = found[0].transpose(1, 0, 2).reshape(len(block), -1)
                _try_to_save(path, partial(np.save, arr=part))
            else:
                moved(len(block))
            parts.append(part)
    return np.concatenate(parts)


def _read_states(path: Path, rows: int) -> np.ndarray | None:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 2 and len(found) == rows and found.dtype == np.float32 else None


def _try_to_save(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Save to the cache; one that cannot be written costs speed, not the run."""
    with suppress(TellError), atomic_path(path) as temporary, temporary.open("wb") as file:
        write(file)


def _add_notices(task: Task, table: RowTable, general: General) -> None:
    compared, known = np.intersect1d(candidates(task, general), general.allowed), queries(task, table)
    if len(compared) < len(general.allowed):
        task.notices.add(
            f"general.select: {len(compared):,} of {len(general.allowed):,} general rows, drawn by seed, are compared "
            "with the task rows, since the states of more would fill the memory"
        )
    if len(known) < len(table):
        task.notices.add(f"general.select: {len(known):,} of {len(table):,} task rows, drawn by seed, are compared")
