"""Examples to ids and trained spans, by the template's frame where there is one, else rendered and encoded whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tell.anchor.anchor import Anchor
from tell.data.example import Example, Message
from tell.errors import TellError
from tell.rows.frame import Frame, Frames
from tell.rows.render import Rendered, Span, render_row
from tell.rows.template import ChatTokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

SAMPLE = 128  # every 128th row made from a frame is also rendered and encoded whole, and compared
Row = tuple[list[int], list[Span], int]  # ids, trained tokens [first, last), tokens of the contents in the unit


class FramesDiffer(Exception):
    """A row made from a frame differs from the same row rendered and encoded whole."""


@dataclass(slots=True)
class _Chunk:
    """Texts of some rows, ready to be encoded."""

    begin: int
    rows: list[tuple[Frame, int, int] | None] = field(default_factory=list)  # frame, first part, join tokens
    parts: list[str] = field(default_factory=list)
    long: dict[int, Rendered] = field(default_factory=dict)
    refused: dict[int, TellError] = field(default_factory=dict)
    contents: dict[int, str] = field(default_factory=dict)  # row: what is counted in the unit
    encoded: list[list[Encoding]] = field(default_factory=list)  # of parts, long and contents


class Encoder:
    """Encodes examples of one source for one model.

    Args:
        chat: the model's template and tokenizer.
        unit: the tokenizer that budgets are counted in.
        anchor: put on every row.
        frames: of ``chat``; None to render and encode every row whole.

    Attributes:
        context: number of earlier answers without loss so far, by row.
    """

    def __init__(self, chat: ChatTokenizer, unit: ChatTokenizer, anchor: Anchor, frames: Frames | None) -> None:
        self.chat, self.unit, self.anchor, self.frames = chat, unit, anchor, frames
        self.same_unit = unit is chat
        self.context: dict[int, int] = {}

    def encode(self, examples: Sequence[Example], size: int) -> Iterator[tuple[int, list[Row | TellError]]]:
        """Yield (index of the first, rows) of every ``size`` examples; the next ones are encoded meanwhile.

        A row that cannot be trained as it will be decoded is replaced by the error that says why.

        Raises:
            FramesDiffer: a frame fails its sample.
        """
        with ThreadPoolExecutor(1) as pool:  # the tokenizer releases the interpreter's lock
            waiting: Future[_Chunk] | None = None
            for begin in range(0, len(examples), size):
                chunk = self._prepare(begin, examples[begin : begin + size])
                coming = pool.submit(self._run, chunk)
                if waiting is not None:
                    yield self._finish(waiting.result())
                waiting = coming
            if waiting is not None:
                yield self._finish(waiting.result())

    def _prepare(self, begin: int, examples: Sequence[Example]) -> _Chunk:
        chunk = _Chunk(begin)
        for k, example in enumerate(examples):
            messages = self.anchor.apply(example.messages)
            frame, joins = self._frame(messages)
            if frame is not None:
                chunk.rows.append((frame, len(chunk.parts), joins))
                chunk.parts += [h + m.content for h, m in zip(frame.headers, messages, strict=True)]
            else:
                chunk.rows.append(None)
            sampled = frame is None or (begin + k) % SAMPLE == 0
            if sampled:
                try:
                    chunk.long[k] = render_row(self.chat, messages)
                except TellError as error:
                    chunk.refused[k] = error
                    continue
                if count := chunk.long[k].context:
                    self.context[begin + k] = count
            if sampled or not self.same_unit:
                chunk.contents[k] = "\n".join([m.content for m in messages])
        return chunk

    def _frame(self, messages: Sequence[Message]) -> tuple[Frame | None, int]:
        """The frame of a conversation and the tokens of the line breaks between its contents, else (None, 0)."""
        if self.frames is None or len(messages) == 1 or not all([m.is_plain for m in messages]):
            return None, 0
        frame, joins = self.frames.of(messages), 0
        if frame is not None and self.same_unit:
            for message in messages[:-1]:
                tokens = self.frames.join_tokens(message.content)
                if tokens is None:
                    return None, 0
                joins += tokens
        return frame, joins

    def _run(self, chunk: _Chunk) -> _Chunk:
        chat, unit = self.chat.backend, self.unit.backend
        chunk.encoded = [
            chat.encode_batch_fast(chunk.parts, add_special_tokens=False),
            chat.encode_batch([row.text for row in chunk.long.values()], add_special_tokens=False),
            unit.encode_batch_fast(list(chunk.contents.values()), add_special_tokens=False),
        ]
        return chunk

    def _finish(self, chunk: _Chunk) -> tuple[int, list[Row | TellError]]:
        parts, whole, counted = chunk.encoded
        units = {k: len(encoding) for k, encoding in zip(chunk.contents, counted, strict=True)}
        long: dict[int, Row] = {}
        for (k, rendered), encoding in zip(chunk.long.items(), whole, strict=True):
            long[k] = (*_whole(self.chat, rendered, encoding), units[k])
        rows: list[Row | TellError] = []
        for k, entry in enumerate(chunk.rows):
            if entry is None:
                row: Row | TellError = long[k] if k in long else chunk.refused[k]
            else:
                ids, spans, unit = _assemble(*entry, parts)
                row = (ids, spans, unit if self.same_unit else units[k])
                if k in chunk.refused or (k in long and row != long[k]):
                    raise FramesDiffer
            rows.append(row if isinstance(row, TellError) else self._ends(row) or row)
        return chunk.begin, rows

    def _ends(self, row: Row) -> TellError | None:
        """The error in the end of a row's answer, where decoding must stop and not before; None if there is none."""
        ids, spans, _ = row
        if not spans or spans[-1][0] >= spans[-1][1]:
            return None  # nothing to train
        first, last = spans[-1]
        if ids[last - 1] not in self.chat.stop_ids:
            return TellError(
                f"decoding of {self.chat.family} does not stop at {self.chat.end_of_turn!r}, which ends its answers",
                remedy="Set eos_token in tokenizer_config.json to a token of the tokenizer.",
            )
        inside = next((i for i in ids[first : last - 1] if i in self.chat.stop_ids), None)
        if inside is None:
            return None
        token = self.chat.backend.id_to_token(inside)
        what = f"the answer holds {token}, at which decoding of {self.chat.family} stops"
        return TellError(what, remedy="Remove it from the answer.")


def _assemble(frame: Frame, first: int, joins: int, parts: list[Encoding]) -> Row:
    """The row of a frame whose contents, each after its header, are ``parts[first:]``."""
    ids: list[int] = []
    spans: list[Span] = []
    unit = joins
    for i, header in enumerate(frame.header_ids):
        part = parts[first + i].ids
        ids += frame.closings[i]
        start = len(ids) + len(header)
        if part[: len(header)] != header:  # the content changes the header's tokens, unlike the probes
            raise FramesDiffer
        ids += part
        unit += len(part) - len(header)
        if frame.answers[i]:
            spans.append((start, len(ids) + 1))  # with the end of turn
    ids += frame.closings[-1]
    return ids, spans, unit


def _whole(chat: ChatTokenizer, row: Rendered, encoding: Encoding) -> tuple[list[int], list[Span]]:
    """(n,) ids of a rendered row and its trained spans in tokens.

    Decoding starts from the prompt's ids alone, so the row begins with exactly these. Where a token of the whole text
    crosses the border between prompt and last answer (``]{``), or the prompt's last tokens differ without the answer
    after them, the two are encoded separately. Tokenizers cut text at added tokens first, so only what follows the
    prompt's last one is checked.
    """
    ids = encoding.ids
    tokens = [_token_span(encoding, ids, start, end) for start, end in row.spans]
    if tokens and tokens[-1][0] < tokens[-1][1]:
        border, first = row.spans[-1][0], tokens[-1][0]
        begin = next((at for at in range(first - 1, -1, -1) if ids[at] in chat.added_ids), 0)
        after = encoding.token_to_chars(begin) if first else None
        tail = row.text[after[0] if after else 0 : border]
        if ids[begin:first] != list(chat.encode_header(tail)):
            head, rest = chat.backend.encode_batch([row.text[:border], row.text[border:]], add_special_tokens=False)
            if ids[: len(head.ids)] == head.ids:  # a special token absorbed the white space after it
                tokens[-1] = (len(head.ids), tokens[-1][1])
            else:
                tokens = [_token_span(head, head.ids, start, end) for start, end in row.spans[:-1]]
                _, last = _token_span(rest, rest.ids, 0, row.spans[-1][1] - border)
                tokens.append((len(head.ids), len(head.ids) + last))
                ids = head.ids + rest.ids
    return ids, tokens


def _token_span(encoding: Encoding, ids: list[int], start: int, end: int) -> Span:
    """Tokens [first, last) of the characters [start, end); characters that the tokenizer drops are skipped."""
    first = last = None
    while start < end and (first := encoding.char_to_token(start)) is None:
        start += 1
    while start < end and (last := encoding.char_to_token(end - 1)) is None:
        end -= 1
    if first is None or last is None:
        return 0, 0
    while last + 1 < len(ids) and encoding.token_to_chars(last + 1) == encoding.token_to_chars(last):
        last += 1  # one character in several byte tokens
    return first, last + 1
