"""Examples to RowTable: render, tokenise in batches, mark the trained tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.data.example import Example
from tell.errors import TellError
from tell.rows.encode import Encoder, FramesDiffer
from tell.rows.frame import Frames
from tell.rows.row_table import Dropped, RowTable
from tell.rows.template import ChatTokenizer

CHUNK = 2048  # rows handed to the tokenizer at once; it works on them in parallel
FEW = 256  # with fewer rows, finding the template's frame costs more than it saves


@dataclass(frozen=True, slots=True)
class RowRules:
    """Rules for the rows of a table.

    Attributes:
        max_length: longest row in tokens.
        too_long, nothing_to_train: ``drop`` (counted, named) or ``refuse``.
        loss_on: ``answer`` trains answers and their end tokens, ``all`` every token but the first.
        misfit: ``drop`` or ``refuse`` rows that cannot be trained as they will be decoded.
        vocab: rows of the model's embedding; ids beyond them are a misfit. None: not known.
    """

    max_length: int = 2048
    too_long: Literal["drop", "refuse"] = "drop"
    nothing_to_train: Literal["drop", "refuse"] = "refuse"
    loss_on: Literal["answer", "all"] = "answer"
    misfit: Literal["drop", "refuse"] = "refuse"
    vocab: int | None = None


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
    """A RowTable of the examples of one source, tokenised with the anchor on each.

    Ids go to a growing buffer chunk by chunk, so that Python lists never exceed one chunk. Most rows are assembled
    from the template's frame (`tell.rows.frame`); a sample of these is also rendered and encoded whole, and where one
    differs, all rows are.

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
        TellError: a row is too long, has nothing to train or does not fit the model, and the rules refuse that.
    """
    rules, unit = rules or RowRules(), unit or chat
    if len(examples) >= FEW:
        try:
            return _tokenize(examples, Encoder(chat, unit, anchor, Frames(chat)), source, rules, progress)
        except FramesDiffer:  # rows reported as finished are reported again
            pass
    return _tokenize(examples, Encoder(chat, unit, anchor, None), source, rules, progress)


def _tokenize(
    examples: Sequence[Example], encoder: Encoder, source: str, rules: RowRules, progress: Callable[[int], None] | None
) -> RowTable:
    ids, mask = Buffer(np.int32), Buffer(np.bool_)
    tokens, trained, units = array("i"), array("i"), array("i")
    kept: list[int] = []
    dropped: list[Dropped] = []
    for begin, rows in encoder.encode(examples, CHUNK):
        flat: list[int] = []
        spans: list[tuple[int, int]] = []
        for k, entry in enumerate(rows):
            example = examples[begin + k]
            if not isinstance(entry, TellError):
                entry = unknown_token(entry[0], encoder.chat, rules.vocab) or entry
            if isinstance(entry, TellError):
                dropped.append(Dropped(example.origin, _misfit(entry, rules, example)))
                continue
            row, trained_spans, length = entry
            count = _trained(trained_spans, len(row), rules)
            if reason := _reason(len(row), count, rules, example):
                dropped.append(Dropped(example.origin, reason))
                continue
            place = len(flat)
            flat += row
            if rules.loss_on == "all":
                spans.append((place + 1, len(flat)))
            else:
                spans += [(place + max(a, 1), place + b) for a, b in trained_spans if b > max(a, 1)]
            tokens.append(len(row))
            trained.append(count)
            units.append(length)
            kept.append(begin + k)
        ids.extend(np.array(flat, dtype=np.int32))
        mask.extend(_span_mask(spans, len(flat)))
        if progress:
            progress(len(rows))
    lengths = np.array(tokens, dtype=np.int32)
    return RowTable(
        source=source,
        hashes=np.array([examples[i].hash for i in kept], dtype="U16"),
        origins=np.array([examples[i].origin for i in kept], dtype=str),
        tokens=lengths,
        trained=np.array(trained, dtype=np.int32),
        unit=np.array(units, dtype=np.int32),
        ids=ids.array(),
        mask=mask.array(),
        starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        dropped=dropped,
        notices=_notices(source, encoder),
    )


def _notices(source: str, encoder: Encoder) -> list[str]:
    if not encoder.context:
        return []
    answers, rows = sum(encoder.context.values()), len(encoder.context)
    return [
        f"{source}: {answers:,} earlier answers of {rows:,} rows are context without loss, since the chat template of "
        f"{encoder.chat.family} shows them differently from how decoding writes them; to train one, give it a row"
    ]


class Buffer:
    """A numpy array that grows at its end, by a quarter at a time, in place where the system allows it."""

    def __init__(self, dtype: type) -> None:
        self._data: np.ndarray = np.empty(0, dtype)
        self._size = 0

    def extend(self, values: np.ndarray) -> None:
        """Append (n,) values."""
        end = self._size + len(values)
        if end > len(self._data):
            self._data.resize(end + end // 4, refcheck=False)  # there are no other references before `array`
        self._data[self._size : end] = values
        self._size = end

    def array(self) -> np.ndarray:
        """(size,) all values; the buffer is empty afterwards."""
        data, self._data = self._data, np.empty(0, self._data.dtype)
        data.resize(self._size, refcheck=False)
        self._size = 0
        return data


def _span_mask(spans: list[tuple[int, int]], size: int) -> np.ndarray:
    """(size,) bool, True in the spans [start, end)."""
    edges = np.zeros(size + 1, dtype=np.int32)
    if spans:
        starts, ends = np.array(spans).T
        np.add.at(edges, starts, 1)
        np.add.at(edges, ends, -1)
    return np.cumsum(edges[:-1], dtype=np.int32) > 0


def _trained(spans: list[tuple[int, int]], length: int, rules: RowRules) -> int:
    """Tokens of a row that carry loss; the first one never does, since nothing predicts it."""
    if rules.loss_on == "all":
        return max(0, length - 1) if spans else 0
    return sum(last - max(first, 1) for first, last in spans if last > max(first, 1))


def _reason(length: int, trained: int, rules: RowRules, example: Example) -> str | None:
    """Why a row is dropped, None to keep it; raises where the rules refuse."""
    if length > rules.max_length:
        reason = f"{length:,} tokens, longer than max_length {rules.max_length:,}"
        remedy = "Raise train.max_length, shorten the row, or set train.too_long: drop."
        policy = rules.too_long
    elif not trained:
        reason = "nothing to train: the answer is empty"
        remedy = "Give the row an answer, or set train.nothing_to_train: drop."
        policy = rules.nothing_to_train
    else:
        return None
    if policy == "refuse":
        raise TellError(reason, where=example.origin, remedy=remedy)
    return reason


def _misfit(error: TellError, rules: RowRules, example: Example) -> str:
    """Why a row is dropped that cannot be trained as it will be decoded; raises where the rules refuse."""
    if rules.misfit == "refuse":
        raise TellError(error.what, where=example.origin or error.where, remedy=error.remedy) from error
    return error.what


def unknown_token(ids: Sequence[int], chat: ChatTokenizer, vocab: int | None) -> TellError | None:
    """An error for the first token that the model has no embedding for."""
    if vocab is None or chat.size <= vocab or max(ids, default=0) < vocab:
        return None
    token = next(i for i in ids if i >= vocab)
    return TellError(
        f"{chat.backend.id_to_token(token)} is token {token} of the tokenizer, and the embedding of {chat.family} has "
        f"{vocab:,} rows",
        remedy="Resize the model's embedding to its tokenizer (resize_token_embeddings) and train it, or remove the "
        "token from the data.",
    )


def prompt_ids(chat: ChatTokenizer, example: Example, anchor: Anchor = NO_ANCHOR) -> list[int]:
    """Token ids that decoding starts from: everything before the answer, with the answer's header."""
    return chat.encode(chat.render(anchor.apply(example.asked), add_generation_prompt=True))
