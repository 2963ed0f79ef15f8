"""Examples to RowTable: render, tokenise in batches, mark the trained tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.data.example import Example
from tell.errors import TellError
from tell.rows.table import Dropped, RowTable
from tell.rows.template import ChatTokenizer

CHUNK = 2048  # rows handed to the tokenizer at once; it works on them in parallel


@dataclass(frozen=True, slots=True)
class RowRules:
    """What becomes of a row.

    Attributes:
        max_length: longest row in tokens.
        too_long, nothing_to_train: ``drop`` (counted, named) or ``refuse``.
        loss_on: ``answer`` trains answers and their end tokens, ``all`` every token but the first.
    """

    max_length: int = 2048
    too_long: Literal["drop", "refuse"] = "drop"
    nothing_to_train: Literal["drop", "refuse"] = "refuse"
    loss_on: Literal["answer", "all"] = "answer"


def render_row(chat: ChatTokenizer, messages: Sequence) -> tuple[str, list[tuple[int, int]]]:
    """Text of a conversation and the character spans [start, end) that are trained.

    A span is an answer with its end-of-turn text; white space after that is not trained.

    Raises:
        TellError: the template does not reproduce an answer.
    """
    full = chat.render(messages)
    spans: list[tuple[int, int]] = []
    cursor = 0
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        head = chat.render(messages[:i], add_generation_prompt=True)
        content = message.content
        # A template may alter the head (Qwen3 drops old thoughts) or trim the answer: then look for it.
        start = len(head) if full.startswith(head) else -1
        if start < 0 or not full.startswith(content, start):
            content = content.strip()
            found = full.find(content, start if start >= 0 else cursor)
            if found < 0:
                raise TellError(
                    "the chat template changes the answer's text",
                    where=str(chat.folder),
                    remedy="Use the base model's default template or another chat template.",
                )
            start = found if start < 0 else start
            end = found + len(content)
        else:
            end = start + len(content)
        turn = chat.end_of_turn
        gap = len(full[end:]) - len(full[end:].lstrip())
        if turn and full.startswith(turn, end):
            end += len(turn)
        elif turn and full.startswith(turn, end + gap):
            end += gap + len(turn)
        elif i == len(messages) - 1:  # the template closes no answer: end it ourselves, or it never learns to stop
            full = full[:end] + turn
            end = len(full)
        if message.content:
            spans.append((start, end))
        cursor = end
    return full, spans


def tokenize(
    examples: Sequence[Example],
    chat: ChatTokenizer,
    *,
    source: str,
    anchor: Anchor = NO_ANCHOR,
    rules: RowRules | None = None,
    unit: ChatTokenizer | None = None,
    progress: Callable[[int], None] | None = None,
) -> RowTable:
    """Tokenise examples of one source, with the anchor on each.

    Args:
        examples: n examples.
        chat: the model's template and tokenizer.
        source: name kept in the table.
        anchor: put on every row; NO_ANCHOR for general data.
        rules: lengths and what is trained.
        unit: tokenizer that budgets are counted in; None for the model's own.
        progress: called with the number of rows finished in each chunk.

    Returns:
        A RowTable of the rows kept, the others in ``dropped``.

    Raises:
        TellError: a row is too long or has nothing to train and the rules refuse that.
    """
    rules = rules or RowRules()
    unit_backend = (unit or chat).backend
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    units: list[int] = []
    kept: list[int] = []
    dropped: list[Dropped] = []
    for begin in range(0, len(examples), CHUNK):
        chunk = examples[begin : begin + CHUNK]
        texts, spans, contents = [], [], []
        for example in chunk:
            messages = anchor.apply(example.messages)
            try:
                text, span = render_row(chat, messages)
            except TellError as error:
                raise TellError(error.what, where=example.origin or error.where, remedy=error.remedy) from error
            texts.append(text)
            spans.append(span)
            contents.append("\n".join(m.content for m in messages))
        encodings = chat.backend.encode_batch(texts, add_special_tokens=False)
        lengths = [len(e.ids) for e in unit_backend.encode_batch(contents, add_special_tokens=False)]
        for k, (encoding, span) in enumerate(zip(encodings, spans, strict=True)):
            row = np.array(encoding.ids, dtype=np.int32)
            mask = np.zeros(len(row), dtype=bool)
            if rules.loss_on == "all":
                mask[1:] = bool(span)
            else:
                for start, end in span:
                    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
                    if first is not None and last is not None:
                        mask[first : last + 1] = True
            mask[:1] = False  # the first token is never predicted
            reason = _reason(row, mask, rules, chunk[k])
            if reason:
                dropped.append(Dropped(chunk[k].origin, reason))
                continue
            ids.append(row)
            masks.append(mask)
            units.append(lengths[k])
            kept.append(begin + k)
        if progress:
            progress(len(chunk))
    tokens = np.array([len(row) for row in ids], dtype=np.int32)
    return RowTable(
        source=source,
        hashes=np.array([examples[i].hash for i in kept], dtype="U16"),
        origins=np.array([examples[i].origin for i in kept], dtype=str),
        tokens=tokens,
        trained=np.array([int(mask.sum()) for mask in masks], dtype=np.int32),
        unit=np.array(units, dtype=np.int32),
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        mask=np.concatenate(masks) if masks else np.zeros(0, bool),
        starts=np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)]).astype(np.int64),
        dropped=dropped,
    )


def _reason(row: np.ndarray, mask: np.ndarray, rules: RowRules, example: Example) -> str | None:
    """Why a row is dropped, None to keep it; raises where the rules refuse."""
    if len(row) > rules.max_length:
        reason = f"{len(row):,} tokens, longer than max_length {rules.max_length:,}"
        remedy = "Raise train.max_length, shorten the row, or set train.too_long: drop."
        policy = rules.too_long
    elif not mask.any():
        reason = "nothing to train: the answer is empty"
        remedy = "Give the row an answer, or set train.nothing_to_train: drop."
        policy = rules.nothing_to_train
    else:
        return None
    if policy == "refuse":
        raise TellError(reason, where=example.origin, remedy=remedy)
    return reason


def prompt_ids(chat: ChatTokenizer, example: Example, anchor: Anchor = NO_ANCHOR) -> list[int]:
    """Ids of everything before the answer, with the answer's header: what decoding starts from."""
    return chat.encode(chat.render(anchor.apply(example.prompt), add_generation_prompt=True))
