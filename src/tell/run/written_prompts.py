"""Prompts in the style of the task's, written by the untuned model, where the user has none without answers.

The model goes on with a list of some training prompts (self-instruct, arXiv 2212.10560), begun as its own answer: asked
for one more in words, a small model leaves their style. Blocks, seeds and the cache are those of
`tell.run.written_blocks`: a larger number of prompts extends a smaller one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tell.data.example import Example, Message
from tell.data.overlap import find_overlap
from tell.files import read_jsonl
from tell.home import tell_home
from tell.mix.mixture import PSEUDO
from tell.rows.row_cache import cache_key
from tell.run.self_written import decoding_of, faulty_text, shares
from tell.run.task import Task
from tell.run.written_blocks import BLOCK, write_blocks
from tell.seeds import permutation

if TYPE_CHECKING:
    from tell.run.session import Session

VERSION = 2
SHOWN = 3  # training prompts that the model sees
TRIES = 4  # most prompts written for one that is wanted
TEMPERATURE, TOP_P = 0.7, 0.95
ROOM, LEAST = 1.5, 0.5  # longest prompt, by the longest training prompt, and shortest by the shortest
REQUEST = "Write a list of texts of one kind, each with its number."


def write_prompts(session: Session, task: Task, wanted: int, engine: str | None = None) -> tuple[list[Example], dict]:
    """Prompts that the model writes, without copies of training, validation and test prompts.

    Args:
        session: of the untuned model.
        task: with the rows of its budget.
        wanted: prompts; there may be fewer, if the model writes too few usable ones in `TRIES` times as many tries.
        engine: wrote the prompts that the run has already; None: the one that decodes now writes them.

    Returns:
        The prompts, each with an empty answer, and ``{"asked", "kept", "thrown": {reason: prompts}, "engine"}``.
    """
    asked = [example.question for example in task.train if example.question.strip()]

    def usable(rows: Sequence[dict]) -> tuple[list[Example], Counter[str]]:
        examples = [_prompt(task, row["instruction"], i) for i, row in enumerate(rows)]
        tested = find_overlap(examples, task.test).indices
        known = find_overlap(examples, [*task.train, *task.validation]).indices - tested
        lost = Counter({"like a test prompt": len(tested), "like a training prompt": len(known)})
        return [e for i, e in enumerate(examples) if i not in tested and i not in known], +lost

    path, facts = write_blocks(
        session,
        lambda name: _file(session, asked, name),
        lambda rows: len(usable(rows)[0]) / wanted,
        block=lambda number, thrown, moved: _block(session, asked, number, thrown, moved),
        title="prompts, written by the model",
        most=max(2, -(-TRIES * wanted // BLOCK)),
        engine=engine,
    )
    found, lost = usable(read_jsonl(path))
    thrown = Counter(facts["thrown"]) + lost
    return found[:wanted], {**facts, "kept": len(found), "thrown": dict(thrown.most_common())}


def _file(session: Session, asked: Sequence[str], engine: str) -> Path:
    """The file of the prompts that an engine wrote with this model, task and settings."""
    config = session.config
    key = cache_key(
        what="prompts",
        version=VERSION,
        model=session.files.fingerprint,
        tokenizer=session.chat.fingerprint,
        seed=config.seed,
        asked=list(asked),
        arithmetic=[*config.model.arithmetic, engine, config.generate.batch_size],
        sampling=[TEMPERATURE, TOP_P],
    )
    return tell_home() / "self" / f"{key}.jsonl"


def _prompt(task: Task, text: str, number: int) -> Example:
    """A text as a prompt of the task, after the system text that its first row has."""
    system = task.train[0].prompt[:1] if task.train[0].prompt[0].role == "system" else ()
    turns = (*system, Message("user", text), Message("assistant", ""))
    return Example.of(turns, source=PSEUDO, origin=f"written:{number + 1}")


def _block(
    session: Session, asked: Sequence[str], number: int, thrown: Counter[str], moved: Callable[[float], None]
) -> list[dict]:
    """One block of prompts, as rows of `tell.run.self_written`."""
    config, chat, engine = session.config, session.chat, session.engine
    longest = max(len(e.ids) for e in chat.backend.encode_batch(list(asked), add_special_tokens=False))
    limit = max(16, int(ROOM * longest))
    room = engine.max_positions - limit
    requests = []
    for i in range(BLOCK):
        order = permutation(len(asked), config.seed, "written prompts", number, i)[:SHOWN]
        requests.append(_request(session, [asked[int(j)] for j in order], room))
    if lost := sum(not shown for _, shown in requests):
        thrown["no room for a training prompt"] += lost
        requests = [request for request in requests if request[1]]
    if not requests:
        return []
    seed = config.seed * 100_003 + 2 * number + 1
    decoding = replace(decoding_of(config, limit, chat.stop_ids, TEMPERATURE, seed), top_p=TOP_P)
    copies, rows = {text.strip().casefold() for text in asked}, []
    least = max(1, int(LEAST * min(map(len, asked))))
    written = engine.generate([ids for ids, _ in requests], decoding, progress=shares(len(requests), moved))
    for answer, (_, shown) in zip(written, requests, strict=True):
        text, following, _ = _item(chat.decode(answer.ids), shown + 2)
        if answer.finish != "stop" and not following:
            reason: str | None = "too long"
        elif len(text) < least:
            reason = "too short" if text else "empty"
        else:
            reason = "like a training prompt" if text.casefold() in copies else faulty_text(text)
        if reason:
            thrown[reason] += 1
        else:
            rows.append({"instruction": text, "output": ""})
    return rows


def _request(session: Session, texts: Sequence[str], room: int) -> tuple[list[int], int]:
    """Tokens of a list of as many texts as fit, up to the next number, and how many; 0: not even one does."""
    chat = session.chat
    head = chat.render([Message("user", REQUEST)], add_generation_prompt=True)
    for shown in range(len(texts), 0, -1):
        listed = "".join(f"{i}. {text.strip()}\n\n" for i, text in enumerate(texts[:shown], 1))
        if len(ids := chat.encode(f"{head}{listed}{shown + 1}.")) < room:
            return ids, shown
    return [], 0


def _item(text: str, number: int) -> tuple[str, str, str]:
    """One item of a list, the number of the next one where that was reached, and what follows."""
    item, *more = re.split(rf"(\n\s*{number}\s*[.)])", text, maxsplit=1)
    item = item.strip()
    if len(item) > 1 and item[0] == item[-1] == '"':
        item = item[1:-1].strip()
    return item, *(more or ("", ""))
