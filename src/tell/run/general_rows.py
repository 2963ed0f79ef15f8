"""General rows of a run: those that may be mixed in, those held out, those drawn. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from tell.config import Config
from tell.data.example import Example
from tell.data.general import GeneralSource, resolve_source
from tell.data.overlap import find_overlap
from tell.data.sources import Loaded
from tell.mix.amount import Draw, drawing_order, general_rows
from tell.models.wheel import HUB_NAME
from tell.rows.row_cache import cache_key, cached_table
from tell.rows.row_table import Dropped, RowTable
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, tokenize
from tell.run.misfits import check_general, cleaned
from tell.run.task import Task
from tell.run.task_rows import describe, overlap_facts
from tell.seeds import permutation
from tell.shown import left_out

ROUNDING = 1e-9  # of a sum of shares
ROW_TOKENS = 1000  # of a general row, to estimate how many a budget needs; conversations are long


@dataclass(frozen=True)
class General:
    """General data of a run.

    Attributes:
        table: all usable rows, tokenised.
        allowed: (m,) indices of rows that may be mixed in.
        held_out: indices of rows kept for measuring general loss.
        facts: ``general`` of findings.json.
        dropped: rows left out, with reasons.
        overlap: ``general_test`` of findings.json; None where it was not computed.
        overlap_dropped: rows left out as near-duplicates of a test row.
        written: the model wrote the rows.
        estimated: the model has yet to write them; ``table`` has lengths alone.
        source: what the rows were read from; None for an estimate.
        ranking: (m,) `allowed`, nearest to the task rows first; None where nothing was ranked.
        recast: (rows of the source,) index in ``table`` of each row's recast version, -1 where it has none; None where
            nothing is recast. The recast versions follow the rows of the source.
    """

    table: RowTable
    allowed: np.ndarray
    held_out: np.ndarray
    facts: dict
    dropped: list[dict]
    overlap: dict | None = None
    overlap_dropped: int = 0
    written: bool = False
    estimated: bool = False
    source: GeneralSource | None = field(default=None, repr=False)
    ranking: np.ndarray | None = None
    recast: np.ndarray | None = None

    @property
    def source_rows(self) -> int:
        """Rows of the table that the source has; recast versions are not counted."""
        return len(self.table) if self.recast is None else len(self.recast)

    def examples(self, chat: ChatTokenizer) -> dict[str, Example]:
        """The rows of the source with their texts, by content hash."""
        if self.source is None or self.source.read is None:
            raise ValueError("the general rows have no texts")
        return {example.hash: example for example in cleaned(self.source.read(), chat)[0].examples}


def source_of(task: Task) -> GeneralSource:
    """The run's source of general rows; says where the built-in rows are another model's answers."""
    source = resolve_source(task.config, tokens=_tokens_needed(task))
    for text in source.notices:
        task.notices.add(text)
    if source.name == "builtin" and task.files.name != HUB_NAME and task.general_target == "text":
        task.notices.add(
            f"general data: the built-in rows are SmolLM2-135M's answers, not {task.files.name}'s, and it is trained "
            "on their text; train.general_target=auto keeps its own distributions over them"
        )
    return source


def _tokens_needed(task: Task) -> float:
    """About how many general tokens the run draws, holds out and chooses among, before anything is tokenised."""
    config = task.config
    characters = sum(len(m.content) for example in task.train for m in example.messages)
    ((way, amount),) = config.general.amount(max(1, characters // 3)).items()
    rows = max(4 * config.eval.forgetting_rows, int(amount) if way == "rows" else 0)
    tokens = amount if way == "tokens" else amount * characters / 3 if way == "ratio" else 0.0
    choice = 4 if config.general.select == "similar" else 1
    return choice * max(tokens + config.eval.forgetting_rows * ROW_TOKENS, rows * ROW_TOKENS)


def read_general(task: Task, *, overlap: bool = True) -> General | None:
    """The general rows of a run; None where there are none or the model has to write them.

    Raises:
        TellError: see `load_general`.
    """
    source = source_of(task)
    return None if source.read is None else load_general(task, source, overlap=overlap)


def load_general(task: Task, source: GeneralSource, *, overlap: bool = True) -> General:
    """A general source as rows: tokenised (cached), with rows held out and its overlap with the test rows found.

    Args:
        source: a source of rows; rows that the model wrote are a file.
        overlap: False skips the comparison with the test rows, which needs the texts and not only the cache.

    Raises:
        TellError: anything wrong with the source.
    """
    config = task.config
    if source.read is None:
        raise ValueError(f"the general source {source.name} has no rows to read")
    fingerprint = None if overlap else source.fingerprint()
    loaded = source.read() if fingerprint is None else None
    table = _table(task, source, loaded, fingerprint)
    check_general(table, source.name)
    for text in left_out((d.origin, d.reason) for d in table.dropped):
        task.display.note(text)  # not a notice: findings.json and plan.json list the rows themselves
    for notice in table.notices:
        task.notices.add(notice)
    blocked: set[int] = set()
    shared = None
    if overlap and loaded is not None:
        found = find_overlap(loaded.examples, task.test)
        shared = overlap_facts(found, loaded.examples, task.test)
        if config.task.drop_overlap and found.indices:
            hashes = {loaded.examples[i].hash for i in found.indices}
            blocked = {i for i, h in enumerate(table.hashes) if str(h) in hashes}
    usable = np.array([i for i in range(len(table)) if i not in blocked], dtype=np.int64)
    wanted = min(config.eval.forgetting_rows, len(usable) // 4)
    order = permutation(len(usable), config.seed, "held out")
    held_out, rest = np.sort(usable[order[:wanted]]), np.sort(usable[order[wanted:]])
    rest = rest[~np.isin(table.hashes[rest], table.hashes[held_out])]  # a row that occurs twice is held out twice
    facts = {**table.facts, "path": loaded.path if loaded else source.name}  # the cache goes by a file's content alone
    facts |= source.named.facts if source.named else {}
    dropped = [{"origin": d.origin, "reason": d.reason} for d in table.dropped]
    return General(table, rest, held_out, facts, dropped, shared, len(blocked), source=source)


def _table(task: Task, source: GeneralSource, loaded: Loaded | None, fingerprint: str | None) -> RowTable:
    """The tokenised rows of a source, from the cache where it has them."""
    train = task.config.train
    rules = RowRules(train.max_length, "drop", "drop", train.loss_on, "drop", task.files.architecture.vocab)

    def make() -> RowTable:
        data = loaded or source.read()  # type: ignore[misc]  # checked by `load_general`
        lost = [Dropped(origin, reason) for origin, reason in data.dropped]
        data, notices = cleaned(data, task.chat)
        with task.display.bar("tokenise general data", len(data.examples)) as advance:
            table = tokenize(data.examples, task.chat, source="general", rules=rules, unit=task.unit, progress=advance)
        table.dropped[:0] = lost
        table.notices[:0] = [*data.notices, *notices]
        table.facts = describe(data)
        return table

    key = cache_key(
        data=loaded.fingerprint if loaded else fingerprint,
        tokenizer=task.chat.fingerprint,
        unit=task.unit.fingerprint,
        rules=[rules.max_length, rules.loss_on, rules.vocab],
    )
    return cached_table(key, make)[0]


def trained_on(table: RowTable, loss_on: Literal["answer", "all"]) -> RowTable:
    """The same rows with loss on every token but the first of each: for an arm that trains prompts too.

    Raises:
        ValueError: ``answer``, which a table that was made for ``all`` does not know any more.
    """
    if loss_on == "answer":
        raise ValueError("an arm trains on answers alone in a run that trains on all tokens")
    mask = np.ones(len(table.ids), dtype=bool)
    if len(mask):  # rows that the model has yet to write have no tokens
        mask[table.starts[:-1]] = False
    return replace(table, mask=mask, trained=table.tokens - 1)


def draw_general(config: Config, general: General, task_tokens: int) -> Draw:
    """The general rows drawn for the mix; the amount follows the task's tokens where none is set.

    With ``general.select: similar`` the nearest are drawn, where they are ranked; with ``general.recast`` a share of
    the rows, by the order of drawing, is replaced by the recast versions, whose tokens count.
    """
    settings = config.general
    ((way, amount),) = settings.amount(task_tokens).items()
    order = None
    if settings.select == "similar" and general.ranking is not None:
        order = np.searchsorted(general.allowed, general.ranking)
    rows = _with_recast(general, settings.recast, order, config.seed)
    draw = general_rows(
        general.table.unit[rows],
        task_tokens=task_tokens,
        seed=config.seed,
        rows=int(amount) if way == "rows" else None,
        tokens=amount if way == "tokens" else None,
        ratio=amount if way == "ratio" else None,
        order=order,
    )
    notices = list(draw.notices)
    if settings.select == "similar" and len(draw) and exhausts(draw, general) and not general.estimated:
        notices.append(
            f"general.select: similar changes nothing, since all {len(general.allowed):,} general rows are drawn; "
            "give more general data, or a smaller amount"
        )
    return Draw(rows[draw.indices].astype(np.int32), draw.epochs, notices)


def exhausts(draw: Draw, general: General) -> bool:
    """Whether a draw takes every row that may be mixed in."""
    return len(draw) >= len(general.allowed)


def _with_recast(general: General, share: float, order: np.ndarray | None, seed: int) -> np.ndarray:
    """(m,) `allowed`, with a share of the rows replaced by their recast versions.

    They are taken at equal distances in the order of drawing, so that any amount drawn has that share of them.
    """
    rows = general.allowed.copy()
    if general.recast is None or not share:
        return rows
    owed = 0.0
    for i in drawing_order(len(rows), seed) if order is None else order:
        owed += share
        if owed >= 1 - ROUNDING and general.recast[rows[i]] >= 0:
            rows[i] = general.recast[rows[i]]
            owed -= 1
    return rows
