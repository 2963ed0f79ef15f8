"""The general side of a run: its source, its rows, which of them are held out and which are drawn. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tell.config import Config
from tell.data.builtin import load_builtin
from tell.data.overlap import find_overlap
from tell.data.sources import file_fingerprint, load
from tell.files import expanded
from tell.mix.amount import Draw, general_rows
from tell.models.wheel import HUB_NAME
from tell.progress import Display, Silent
from tell.rows.row_cache import cache_key, cached_table
from tell.rows.row_table import Dropped, RowTable
from tell.rows.tokenize import RowRules, tokenize
from tell.run.misfits import check_general, cleaned
from tell.run.prepare import MIXED, Task, describe, overlap_facts
from tell.seeds import permutation
from tell.shown import left_out


@dataclass
class General:
    """General data of a run.

    Attributes:
        table: all usable rows, tokenised.
        allowed: (m,) indices of rows that may be mixed in.
        held_out: indices of rows kept for measuring what was forgotten.
        facts: ``general`` of findings.json.
        dropped: rows left out, with reasons.
    """

    table: RowTable
    allowed: np.ndarray
    held_out: np.ndarray
    facts: dict
    dropped: list[dict]


def load_general(task: Task, source: str, display: Display, *, overlap: bool = True) -> General:
    """Tokenise a general source (cached), hold rows out, find its overlap with the test rows.

    Args:
        source: a file, a hub name or `builtin`; what `self` wrote is a file.
        overlap: False skips the comparison with the test rows, which needs the texts and not only the cache.

    Raises:
        TellError: whatever is wrong with the source.
    """
    config = task.config
    columns = config.general.columns
    vocab = task.files.architecture.vocab
    rules = RowRules(config.train.max_length, "drop", "drop", config.train.loss_on, "drop", vocab)
    loaded = load_builtin() if source == "builtin" else None
    is_file = expanded(source).is_file()
    if loaded is None and (not is_file or overlap):
        loaded = load(source, name="general", columns=columns)
    key = cache_key(
        data=loaded.fingerprint if loaded else file_fingerprint(expanded(source), columns, "general"),
        tokenizer=task.chat.fingerprint,
        unit=task.unit.fingerprint,
        rules=[rules.max_length, rules.loss_on, rules.vocab],
    )

    def make() -> RowTable:
        data = loaded or load(source, name="general", columns=columns)
        lost = [Dropped(origin, reason) for origin, reason in data.dropped]
        data, notices = cleaned(data, task.chat)
        with display.bar("tokenise general data", len(data.examples)) as advance:
            table = tokenize(data.examples, task.chat, source="general", rules=rules, unit=task.unit, progress=advance)
        table.dropped[:0] = lost
        table.notices[:0] = [*data.notices, *notices]
        table.facts = describe(data)
        return table

    table, _ = cached_table(key, make)
    check_general(table, source)
    dropped = [{"origin": d.origin, "reason": d.reason} for d in table.dropped]
    for text in left_out((d.origin, d.reason) for d in table.dropped):
        display.note(text)  # no notice: findings.json and plan.json list the rows themselves
    for notice in table.notices:
        task.notice(notice, display)
    layout = {
        **table.facts,
        "path": loaded.path if loaded else source,
    }  # the cache knows a file by its content, whatever it is called
    blocked: set[int] = set()
    if overlap and loaded is not None:
        found = find_overlap(loaded.examples, task.test)
        task.findings["overlap"]["general_test"] = overlap_facts(found, loaded.examples, task.test)
        if config.task.drop_overlap and found.indices:
            hashes = {loaded.examples[i].hash for i in found.indices}
            blocked = {i for i, h in enumerate(table.hashes) if str(h) in hashes}
            task.findings["overlap"]["dropped"] += len(blocked)
    usable = np.array([i for i in range(len(table)) if i not in blocked], dtype=np.int64)
    wanted = min(config.eval.forgetting_rows, len(usable) // 4)
    order = permutation(len(usable), config.seed, "held out")
    held_out, rest = np.sort(usable[order[:wanted]]), np.sort(usable[order[wanted:]])
    rest = rest[~np.isin(table.hashes[rest], table.hashes[held_out])]  # a row that occurs twice is held out twice
    task.findings["general"] = layout
    return General(table, rest, held_out, layout, dropped)


def draw_general(config: Config, general: General, task_tokens: int) -> Draw:
    """The general rows of the mix; by the task's tokens where no amount was given."""
    amount = config.general.amount(task_tokens)
    draw = general_rows(general.table.unit[general.allowed], task_tokens=task_tokens, seed=config.seed, **amount)
    return Draw(general.allowed[draw.indices].astype(np.int32), draw.epochs, draw.notices)


def general_source(task: Task, display: Display | None = None) -> str:
    """Where general rows come from: a file or hub name, `builtin`, `self`, or `none`.

    Rows on board are answers of one model: they are the default for that model, while any other answers the prompts
    itself, so that what it rehearses is its own (arXiv 2402.13669). Nothing is written that no arm asked for is
    trained on.
    """
    amount = task.config.general
    if amount.is_given or amount.source == "none":
        return amount.source
    if amount.empty or not MIXED.intersection(task.config.eval.arms):
        return "none"
    own = task.files.name == HUB_NAME
    if amount.source == "builtin" and not own:
        text = f"general data: the rows on board are SmolLM2-135M's answers, not {task.files.name}'s; "
        task.notice(text + "with --general self the model answers the prompts itself", display or Silent())
    if amount.source == "auto":
        return "builtin" if own else "self"
    return amount.source
