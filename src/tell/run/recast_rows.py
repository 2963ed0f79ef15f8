"""Recast versions of a run's general rows (``general.recast``), tokenised next to them. No torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tell.data.recast import VERSION, Form, recast_by
from tell.rows.row_cache import cache_key, cached_table
from tell.rows.row_table import RowTable, joined
from tell.rows.tokenize import RowRules, tokenize
from tell.run.arms import mixed_configs
from tell.run.general_rows import General
from tell.run.task import Task


def with_recast(task: Task, general: General) -> General:
    """The general rows with the recast versions of those that may be mixed in, where a requested arm needs them.

    Held-out rows stay as they are. A version that is too long to train on is left out, and its row is never recast.
    """
    if general.recast is not None or not any(config.general.recast for config in mixed_configs(task.config)):
        return general
    form: Form
    if task.kind.name == "json":
        form = "json"
    elif task.kind.labels:
        form = "label"
    else:
        task.notices.add("general.recast changes nothing: a task of free text has no form that a rule could ask for")
        return general
    if general.estimated or general.source is None:
        task.notices.add(
            "general.recast: the general rows are not written yet, and are counted as they would be written"
        )
        return general
    table = _recast_table(task, general, form)
    place = {name: i for i, name in enumerate(table.facts["of"])}
    size = len(general.table)
    recast = np.full(size, -1, np.int64)
    for row in general.allowed:
        if (found := place.get(str(general.table.hashes[row]))) is not None:
            recast[row] = size + found
    return replace(general, table=joined([general.table, table]), recast=recast)


def _recast_table(task: Task, general: General, form: Form) -> RowTable:
    """The recast versions, from the cache where it has them; ``facts["of"]`` has the hashes of the rows they are of."""
    train, seed = task.config.train, task.config.seed
    rules = RowRules(train.max_length, "drop", "drop", train.loss_on, "drop", task.files.architecture.vocab)
    names = list(dict.fromkeys(map(str, general.table.hashes[general.allowed])))

    def make() -> RowTable:
        texts = general.examples(task.chat)
        made = recast_by([texts[name] for name in names], form, seed)
        origin = {example.hash: name for name, example in made.items()}
        with task.display.bar("recast general data", len(made)) as advance:
            rows = list(made.values())
            table = tokenize(rows, task.chat, source="general", rules=rules, unit=task.unit, progress=advance)
        table.facts = {"of": [origin[str(key)] for key in table.hashes]}
        table.dropped, table.notices = [], []  # the rows themselves are not left out
        return table

    key = cache_key(
        what="recast",
        recast=VERSION,
        form=form,
        seed=seed,
        rows=names,
        tokenizer=task.chat.fingerprint,
        unit=task.unit.fingerprint,
        rules=[rules.max_length, rules.loss_on, rules.vocab],
    )
    return cached_table(key, make)[0]
