"""Which general rows are nearest to the task rows, as far as it is known (``general.select: similar``). No torch.

`tell.run.rank_general` computes it. Orders are cached by all that they depend on, so that plans, the runs of a study
and resumed runs come to the same draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from tell.data.example import Example
from tell.home import tell_home
from tell.mix.amount import drawing_order
from tell.readout.readout import readout_layers
from tell.rows.row_cache import cache_key
from tell.rows.row_table import RowTable
from tell.run.arms import mixed_configs
from tell.run.general_rows import General, draw_general, exhausts
from tell.run.task import Task
from tell.seeds import permutation

VERSION = 1  # raise when a change to the ranking changes it
MOST_TASK_ROWS = 1000  # more hardly change which general rows are near, and every pair is compared
MOST_BYTES = 1 << 30  # of the states of the general rows: 58,000 rows of SmolLM2-135M's


def needs_ranking(task: Task, table: RowTable, general: General) -> bool:
    """Whether a requested arm draws fewer general rows than there are, and the nearest of them."""
    if general.estimated:
        return False
    tokens = int(table.unit.sum())
    similar = (config for config in mixed_configs(task.config) if config.general.select == "similar")
    draws = (draw_general(config, general, tokens) for config in similar)
    return any(len(draw) and not exhausts(draw, general) for draw in draws)


def with_known_ranking(task: Task, table: RowTable, general: General) -> General:
    """The general rows with their ranking, from the cache; a notice where a plan has to do without."""
    if general.ranking is not None:
        return general
    if general.estimated and any(config.general.select == "similar" for config in mixed_configs(task.config)):
        task.notices.add("general.select: the general rows are not written yet; a random draw is counted")
    if not needs_ranking(task, table, general):
        return general
    key = ranking_key(task, table, general)
    ranking = read_ranking(cached_ranking(key), key, general)
    if ranking is None:
        task.notices.add(
            "general.select: the general rows are ranked by the model when it runs; a random draw is counted"
        )
    return replace(general, ranking=ranking)


def queries(task: Task, table: RowTable) -> list[Example]:
    """The task rows that general rows are compared with: those trained on, at most `MOST_TASK_ROWS` by seed."""
    trained = set(map(str, table.hashes))
    rows = [example for example in task.train if example.hash in trained]
    if len(rows) <= MOST_TASK_ROWS:
        return rows
    return [rows[i] for i in np.sort(permutation(len(rows), task.config.seed, "nearest")[:MOST_TASK_ROWS])]


def candidates(task: Task, general: General) -> np.ndarray:
    """(k,) the rows whose states are computed: all of the source, so that runs with other held-out rows share them.

    Where their states would fill the memory: as many of those that may be mixed in, drawn by seed.
    """
    arch = task.files.architecture
    width = len(readout_layers(arch.layers)) * arch.hidden
    most = max(1, MOST_BYTES // (4 * width))
    if general.source_rows <= most:
        return np.arange(general.source_rows)
    allowed = general.allowed
    return np.sort(allowed[drawing_order(len(allowed), task.config.seed)[:most]])


def states_key(task: Task, names: Sequence[str]) -> str:
    """The key of the states of prompts, given by the content hashes of their rows."""
    model = task.config.model
    return cache_key(
        what="states",
        version=VERSION,
        model=task.files.fingerprint,
        tokenizer=task.chat.fingerprint,
        arithmetic=model.arithmetic,
        rows=list(names),
    )


def ranking_key(task: Task, table: RowTable, general: General) -> str:
    """The key of the ranking of these general rows for these task rows: all that it depends on."""
    return cache_key(
        what="nearest",
        states=states_key(task, general.table.hashes[candidates(task, general)].tolist()),
        task=[example.hash for example in queries(task, table)],
        allowed=general.allowed.tolist(),
        seed=task.config.seed if general.source_rows > len(candidates(task, general)) else None,
    )


def cached_ranking(key: str) -> Path:
    """The file of a ranking in the cache."""
    return tell_home() / "nearest" / f"{key}.npz"


def read_ranking(path: Path, key: str, general: General) -> np.ndarray | None:
    """A ranking that was saved under this key; None where there is none."""
    try:
        with np.load(path, allow_pickle=False) as found:
            order, name = found["order"], str(found["key"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    if name != key or order.ndim != 1 or not np.issubdtype(order.dtype, np.integer):
        return None
    return order.astype(np.int64) if np.array_equal(np.sort(order), general.allowed) else None
