"""`tell look`: what a model will see of a task's rows, and findings about them, before training. No torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePath

import numpy as np

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.config import Config
from tell.data.example import Example
from tell.data.how_read import how_read
from tell.errors import TellError
from tell.files import write_text
from tell.models.find import ModelFiles, NotFetched, find_model
from tell.progress import Display, Silent
from tell.report.look_page import render_look
from tell.report.write import check_replaceable
from tell.rows.row_table import RowTable
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import tokenize
from tell.run.prepare import check_tests
from tell.run.task import Notices, Task, anchor_of, limit_task, open_task, placed_anchor
from tell.run.task_rows import Read, TaskRows, read_task, split_task
from tell.seeds import permutation
from tell.shown import shorten
from tell.verbs.look_findings import balance, checks, intervals, listed, row_findings

SHOWN = 5  # rows rendered
MOST_SHOWN = 100
PIECE = 6000  # characters shown of a turn, or of a piece of a rendered row
BINS = 24


@dataclass
class _Seen:
    """Rows and, where this machine has the model, what the model makes of them.

    Attributes:
        rows: a `Task` where the model is known.
        absent: why it is not, with the remedy; empty where it is.
        refused: what `tell tune` would refuse.
        tables: the tokenised rows of each of `PARTS`, none left out for its length.
    """

    read: Read
    rows: Task | TaskRows
    anchor: Anchor
    refused: list[str]
    absent: str = ""
    tables: dict[str, RowTable] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, list[Example]]:
        validation = self.rows.whole_validation if isinstance(self.rows, Task) else self.rows.validation
        return {"train": self.rows.train, "validation": validation, "test": self.rows.test}

    @property
    def task(self) -> Task | None:
        return self.rows if isinstance(self.rows, Task) else None


def look_page(config: Config) -> Path:
    """Where the command `tell look` writes its page by default: in the current folder, named after the data."""
    name = PurePath(config.task.data or "").name
    stem = re.sub(r"[^\w-]+", "-", name.split(".")[0] or name).strip("-")
    return Path(f"{stem or 'data'}.look.html")


def look(config: Config, *, rows: int = SHOWN, page: str | Path | None = None, display: Display | None = None) -> dict:
    """What the model will see of a task's rows, and findings about them, before anything is trained.

    Nothing is trained, nothing but the page is written, and no torch is loaded; only data on the hub needs the network.
    A model that this machine does not have costs the rendering and the counts of tokens; the rest is found without it.

    Args:
        config: as for `tell.tune`.
        rows: number of training rows to render: the longest, the shortest, and others drawn by the seed.
        page: HTML file to write the facts to.

    Returns:
        JSON-compatible facts: how the data was read (``data``, ``test``, ``kind``, ``split``), ``model`` and
        ``anchor``, the rendered ``rows``, closed ``fields`` with their balance and constant baseline, ``lengths`` in
        tokens, ``findings`` about rows, ``intervals`` that the test rows can give, ``notices``, the ``page``, and
        ``checks``: sentences on what to look at, the gravest first.

    Raises:
        TellError: the data cannot be read, the model's files or the configuration are wrong, or the page would replace
            a file that is none.
    """
    if not 1 <= rows <= MOST_SHOWN:
        raise TellError(f"{rows:,} rows cannot be shown", where="--rows", remedy=f"Choose 1 to {MOST_SHOWN}.")
    page = None if page is None else Path(page)
    if page is not None:
        check_replaceable(page, "--html")
    notices = Notices(display or Silent())
    seen = _see(config, notices)
    parts, data = seen.parts, seen.read.data
    fields = balance(seen.rows.kind, parts, seed=config.seed, samples=config.eval.bootstrap)
    every = [example for loaded in seen.read.files for example in loaded.examples]
    findings = row_findings(every, seen.rows.facts)
    if (compared := findings["near_duplicates"]["compared"]) < len(every):
        notices.add(f"near-duplicates are looked for among the first {compared:,} of {len(every):,} rows")
    found: dict = {
        "data": {**how_read(data), **seen.rows.facts.data},
        "test": seen.rows.facts.test,
        "kind": {"name": seen.rows.kind.name, "why": seen.rows.kind.why},
        "split": {name: len(part) for name, part in parts.items()} | seen.rows.facts.duplicates,
        "seed": config.seed,
        "model": _model(seen),
        "anchor": {"text": seen.anchor.text, "place": seen.anchor.place, "unwritten": config.anchor.text == "auto"},
        "rows": [_row(seen, *chosen) for chosen in _choose(seen, rows, config.seed)],
        "fields": fields,
        "lengths": _lengths(seen),
        "findings": findings,
        "intervals": intervals(len(parts["test"]), fields),
        "refused": seen.refused,
        "notices": notices.texts,
    }
    found |= {"page": None if page is None else str(page), "checks": checks(found)}
    if page is not None:
        write_text(page, render_look(found, name=PurePath(config.task.data or "").name))
    return found


def _see(config: Config, notices: Notices) -> _Seen:
    refused: list[str] = []
    anchor = anchor_of(config) or NO_ANCHOR
    try:
        read = read_task(config)
    except TellError as error:
        read = read_task(config, bad_rows="drop")  # raises again where the fault is not of single rows
        refused.append(str(error))
    try:
        files = find_model(
            config.model.name,
            revision=config.model.revision,
            need_weights=False,
            trust_remote_code=config.model.trust_remote_code,
            fetch=False,
        )
    except NotFetched as error:
        rows = split_task(config, read)
        said = [text for loaded in read.files for text in loaded.notices]
        said += [rows.lost, rows.widened, *rows.missing]
        for text in filter(None, said):
            notices.add(text)
        return _Seen(read, rows, anchor, refused, str(error))
    return _rendered(config, _Seen(read, _open(config, read, files, notices), anchor, refused), notices)


def _open(config: Config, read: Read, files: ModelFiles, notices: Notices) -> Task:
    """The task, its budget counted in the model's own tokens: another tokenizer might have to be fetched."""
    if config.tokens.unit != "model":
        if config.task.tokens:
            notices.add("task.tokens is counted in the model's own tokens here")
        config = config.model_copy(update={"tokens": config.tokens.model_copy(update={"unit": "model"})})
    return open_task(config, read, files, notices)


def _rendered(config: Config, seen: _Seen, notices: Notices) -> _Seen:
    """The same with the rows tokenised as a run has them, and what a run would refuse of them."""
    task = seen.task
    assert task is not None
    if anchor_of(config) is None:
        notices.add("the model will write the anchor; a placeholder of similar length is shown")
    seen.anchor = anchor = placed_anchor(task)
    try:
        seen.rows = task = limit_task(task, anchor)
        check_tests(task, anchor)
    except TellError as error:
        seen.refused.append(str(error))
    rules = replace(task.rules, max_length=sys.maxsize, nothing_to_train="drop", misfit="drop")
    for name, part in seen.parts.items():
        table = tokenize(part, task.chat, source="task", anchor=anchor, rules=rules, unit=task.unit)
        seen.tables[name] = table
        for text in table.notices if name == "train" else ():
            notices.add(text)
        if table.dropped:
            first, total = table.dropped[0], len(table.dropped)
            more = f" ({total:,} such rows)" if total > 1 else ""
            seen.refused.append(f"{first.origin}: {first.reason}{more}")
    lengths = seen.tables["train"].tokens
    over = int((lengths > task.rules.max_length).sum())
    if over and (task.rules.too_long == "refuse" or over == len(lengths)):
        seen.refused.append(f"{over:,} of {len(lengths):,} training rows are longer than train.max_length")
    return seen


def _model(seen: _Seen) -> dict:
    if seen.task is None:
        return {"name": None, "absent": seen.absent}
    files, chat = seen.task.files, seen.task.chat
    return {
        "name": files.name,
        "absent": None,
        "origin": files.origin,
        "family": chat.family,
        "own_template": chat.has_own_template,
        "thinking": chat.thinking,
    }


def _choose(seen: _Seen, count: int, seed: int) -> list[tuple[Example, str]]:
    """Training rows and why each is shown: the longest, the shortest, and others drawn by the seed."""
    train, table = seen.rows.train, seen.tables.get("train")
    size = {example.origin: sum(len(m.content) for m in example.messages) for example in train}
    if table is not None and len(table):
        size = dict(zip(table.origins.tolist(), table.tokens.tolist(), strict=True))
    ranked = sorted((i for i in range(len(train)) if train[i].origin in size), key=lambda i: size[train[i].origin])
    chosen = {ranked[-1]: "longest"}
    if count > 1:
        chosen.setdefault(ranked[0], "shortest")
    for i in permutation(len(train), seed, "look").tolist():
        if len(chosen) >= count:
            break
        chosen.setdefault(i, "drawn by the seed")
    return [(train[i], why) for i, why in chosen.items()]


def _row(seen: _Seen, example: Example, why: str) -> dict:
    """A row as it was read and, with a model, as it is trained: its decoded ids in pieces."""
    turns = [{"role": m.role, "text": shorten(m.content, PIECE)} for m in example.messages]
    row = {"origin": example.origin, "why": why, "turns": turns, "pieces": None}
    table = seen.tables.get("train")
    at = [] if table is None else np.flatnonzero(table.origins == example.origin).tolist()
    if seen.task is None or table is None or not at:
        return row
    ids, mask = table.row(at[0])
    pieces = _pieces(seen.task.chat, ids, mask, _anchored(example, seen.anchor))
    return row | {"tokens": len(ids), "trained_tokens": int(mask.sum()), "pieces": pieces}


def _pieces(chat: ChatTokenizer, ids: np.ndarray, mask: np.ndarray, anchored: Sequence[str]) -> list[dict]:
    """The text of a row's ids, cut where the loss mask changes and at the ends of the anchor.

    Args:
        ids: (n,).
        mask: (n,) bool.
        anchored: the anchor's turn, and the anchor.
    """
    whole, starts = chat.backend.decode(ids.tolist(), skip_special_tokens=False), {0: bool(mask[0])}
    for stop in (np.flatnonzero(np.diff(mask)) + 1).tolist():
        # From the row's first token: decoders drop a space at the head of what they are given.
        head = chat.backend.decode(ids[:stop].tolist(), skip_special_tokens=False)
        starts[_shared(head, whole)] = bool(mask[stop])
    first, last = _anchor_span(whole, *anchored)
    pieces, trained = [], False
    for begin, end in pairwise(sorted({*starts, first, last, len(whole)})):
        trained = starts.get(begin, trained)
        pieces.append({"text": shorten(whole[begin:end], PIECE), "trained": trained, "anchor": first <= begin < last})
    return pieces


def _shared(head: str, whole: str) -> int:
    """Characters that both begin with; a character cut in the middle of its bytes is not one."""
    return next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole)))


def _anchored(example: Example, anchor: Anchor) -> tuple[str, str]:
    turns = anchor.apply(example.messages) if anchor else ()
    carriers = (m.content for m in turns if m.role == anchor.place and m.content.startswith(anchor.text))
    return next(carriers, ""), anchor.text


def _anchor_span(text: str, turn: str, anchor: str) -> tuple[int, int]:
    """[start, end) of the anchor in a rendered row; (0, 0) where it is not found as it was written."""
    at = text.find(turn.strip())  # the whole turn first: another one may repeat the anchor's words
    at = text.find(anchor) if at < 0 else at
    return (0, 0) if at < 0 or not turn else (at, at + len(anchor))


def _lengths(seen: _Seen) -> dict | None:
    """Lengths of rendered rows in tokens, and the training rows over the limit; None without a model."""
    tables = {name: table for name, table in seen.tables.items() if len(table)}
    if seen.task is None or not tables:
        return None
    limit, train = seen.task.rules.max_length, seen.tables["train"]
    tokens = np.concatenate([table.tokens for table in tables.values()])
    order = np.argsort(-train.tokens, kind="stable")
    over = order[train.tokens[order] > limit].tolist()
    counts, edges = np.histogram(tokens, bins=BINS, range=(0, int(tokens.max())))
    return {
        "limit": limit,
        "parts": {name: _quantiles(table) for name, table in tables.items()},
        "counts": counts.tolist(),
        "edges": edges.round(1).tolist(),
        "over": listed({"origin": str(train.origins[i]), "tokens": int(train.tokens[i])} for i in over),
    }


def _quantiles(table: RowTable) -> dict[str, int]:
    middle, high = np.percentile(table.tokens, (50, 95))
    return {
        "shortest": int(table.tokens.min()),
        "median": round(middle),
        "95 %": round(high),
        "longest": int(table.tokens.max()),
        "trained, median": round(np.median(table.trained)),
        "trained, longest": int(table.trained.max()),
    }
