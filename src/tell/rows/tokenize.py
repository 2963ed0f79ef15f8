"""Examples to RowTable: render, tokenise in batches, mark the trained tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.data.example import Example, Message
from tell.errors import TellError
from tell.rows.table import Dropped, RowTable
from tell.rows.template import ChatTokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

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


def render_row(chat: ChatTokenizer, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """Text of a conversation and the character spans [start, end) that are trained.

    A span is an answer with its end-of-turn text; white space after that is not trained. What the template
    writes between the answer's header and the answer is trained too, where decoding would have to write it.

    Raises:
        TellError: the template does not reproduce an answer.
    """
    full = chat.render(messages)
    turn = chat.end_of_turn
    spans: list[tuple[int, int]] = []
    places: list[tuple[int, int]] | None = None
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    for nth, i in enumerate(answers):
        head = chat.render(messages[:i], add_generation_prompt=True)
        content = messages[i].content
        if full.startswith(content, len(head)) and full.startswith(head):
            start, end = len(head), len(head) + len(content)
        else:  # the template trims the answer or alters the head (Qwen3 drops old thoughts)
            if places is None:
                places = _find_answers(chat, messages, full)
            start, end = places[nth]
            if full.startswith(head) and len(head) < start:
                start = len(head)
        gap = len(full[end:]) - len(full[end:].lstrip())
        if turn and full.startswith(turn, end):
            end += len(turn)
        elif turn and full.startswith(turn, end + gap):
            end += gap + len(turn)
        elif i == len(messages) - 1:  # the template closes no answer: end it ourselves, or it never learns to stop
            full = full[:end] + turn
            end = len(full)
        if content.strip():
            spans.append((start, end))
    return full, spans


def _find_answers(chat: ChatTokenizer, messages: Sequence[Message], full: str) -> list[tuple[int, int]]:
    """[start, end) of each answer's content in ``full``, by what the template writes around marked answers.

    Searching for the answer's text would find it in the prompt as well: "yes" in "Answer yes or no."
    """
    marked = [
        Message(message.role, f"\ue000{i}\ue001") if message.role == "assistant" else message
        for i, message in enumerate(messages)
    ]
    around, places, cursor = chat.render(marked), [], 0
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before, found, around = around.partition(marked[i].content)
        start = cursor + len(before)
        content = message.content
        shown = next((c for c in (content, content.strip(), content.lstrip()) if full.startswith(c, start)), None)
        if not found or shown is None or full[cursor:start] != before:
            # an answer with thoughts of its own (Qwen3) moves what stands around it; only such long texts get here
            turns, shown = chat.render(messages[:i]), content.strip()
            start = full.find(shown, len(turns)) if full.startswith(turns) else -1
            if start < 0:
                raise TellError(
                    "the chat template changes the answer's text",
                    where=str(chat.folder),
                    remedy="Use the base model's default template or another chat template.",
                )
        cursor = start + len(shown)
        places.append((start, cursor))
    return places


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
        lengths = [len(e.ids) for e in unit_backend.encode_batch_fast(contents, add_special_tokens=False)]
        for k, (encoding, span) in enumerate(zip(encodings, spans, strict=True)):
            row, mask = _row(chat, texts[k], encoding, span)
            if rules.loss_on == "all":
                mask[:] = bool(span)
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


def _row(chat: ChatTokenizer, text: str, encoding: Encoding, spans: list[tuple[int, int]]) -> tuple[np.ndarray, ...]:
    """(n,) ids and (n,) mask of a rendered row.

    Decoding starts from the prompt's ids alone. Where a token of the whole text reaches across the border between
    prompt and last answer (``]{``), or the prompt's last tokens would be others without the answer behind them, the
    two are encoded apart, so that training and decoding see the same ids.
    """
    tokens = [_token_span(encoding, start, end) for start, end in spans]
    if spans and tokens[-1][0] < tokens[-1][1]:
        border, first = spans[-1][0], tokens[-1][0]
        begin = next((at for at in range(first - 1, -1, -1) if encoding.ids[at] in chat.added_ids), 0)
        tail = text[encoding.token_to_chars(begin)[0] if first else 0 : border]
        if encoding.ids[begin:first] != list(chat.encode_header(tail)):
            head, rest = chat.backend.encode_batch([text[:border], text[border:]], add_special_tokens=False)
            ids = head.ids + rest.ids
            mask = np.zeros(len(ids), dtype=bool)
            for start, end in spans[:-1]:
                mask[slice(*_token_span(head, start, end))] = True
            a, b = _token_span(rest, 0, spans[-1][1] - border)
            mask[len(head.ids) + a : len(head.ids) + b] = True
            return np.array(ids, dtype=np.int32), mask
    mask = np.zeros(len(encoding.ids), dtype=bool)
    for first, last in tokens:
        mask[first:last] = True
    return np.array(encoding.ids, dtype=np.int32), mask


def _token_span(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """Tokens [first, last) that hold the characters [start, end); characters the tokenizer drops are passed over."""
    while start < end and encoding.char_to_token(start) is None:
        start += 1
    while start < end and encoding.char_to_token(end - 1) is None:
        end -= 1
    if start >= end:
        return 0, 0
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    while last + 1 < len(encoding.ids) and encoding.token_to_chars(last + 1) == encoding.token_to_chars(last):
        last += 1  # one character in several byte tokens
    return first, last + 1


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
