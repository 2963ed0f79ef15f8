"""Examples to ids and trained spans: from the template's frame where there is one, else rendered and encoded whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tell.anchor.anchor import Anchor
from tell.data.example import Example, Message
from tell.errors import TellError
from tell.rows.frame import Frame, Frames
from tell.rows.template import ChatTokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

SAMPLE = 128  # every 128th row that a frame made is made the long way too, and compared
Span = tuple[int, int]
Row = tuple[list[int], list[Span], int]  # ids, trained tokens [first, last), tokens of the contents in the unit


class FramesDiffer(Exception):
    """A row put together from a frame is not what the template and the tokenizer make of it."""


@dataclass(slots=True)
class _Chunk:
    """Texts of some rows, ready to be encoded."""

    begin: int
    rows: list[tuple[Frame, int, int] | None] = field(default_factory=list)  # frame, first part, join tokens
    parts: list[str] = field(default_factory=list)
    long: dict[int, tuple[str, list[Span]]] = field(default_factory=dict)  # row: text and trained characters
    contents: dict[int, str] = field(default_factory=dict)  # row: what is counted in the unit
    encoded: list[list[Encoding]] = field(default_factory=list)  # of parts, long and contents


class Encoder:
    """Encodes examples of one source for one model.

    Args:
        chat: the model's template and tokenizer.
        unit: the tokenizer that budgets are counted in.
        anchor: put on every row.
        frames: of ``chat``; None to render and encode every row whole.
    """

    def __init__(self, chat: ChatTokenizer, unit: ChatTokenizer, anchor: Anchor, frames: Frames | None) -> None:
        self.chat, self.unit, self.anchor, self.frames = chat, unit, anchor, frames
        self.same_unit = unit is chat

    def encode(self, examples: Sequence[Example], size: int) -> Iterator[tuple[int, list[Row]]]:
        """Yield (index of the first, rows) of every ``size`` examples; the next ones are encoded meanwhile.

        Raises:
            TellError: the template refuses a conversation.
            FramesDiffer: a frame fails its sample.
        """
        begins = range(0, len(examples), size)
        with ThreadPoolExecutor(1) as pool:  # the tokenizer releases the interpreter's lock
            waiting: Future[_Chunk] | None = None
            for begin in begins:
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
                    raise TellError(error.what, where=example.origin or error.where, remedy=error.remedy) from error
            if sampled or not self.same_unit:
                chunk.contents[k] = "\n".join([m.content for m in messages])
        return chunk

    def _frame(self, messages: Sequence[Message]) -> tuple[Frame | None, int]:
        """The frame of a conversation and the tokens of the line breaks between its contents, else (None, 0)."""
        frame = self.frames.of(messages) if self.frames and all([m.is_plain for m in messages]) else None
        joins = 0
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
            chat.encode_batch([text for text, _ in chunk.long.values()], add_special_tokens=False),
            unit.encode_batch_fast(list(chunk.contents.values()), add_special_tokens=False),
        ]
        return chunk

    def _finish(self, chunk: _Chunk) -> tuple[int, list[Row]]:
        parts, whole, counted = chunk.encoded
        units = {k: len(encoding) for k, encoding in zip(chunk.contents, counted, strict=True)}
        long: dict[int, Row] = {}
        for (k, (text, spans)), encoding in zip(chunk.long.items(), whole, strict=True):
            long[k] = (*_whole(self.chat, text, encoding, spans), units[k])
        rows: list[Row] = []
        for k, entry in enumerate(chunk.rows):
            if entry is None:
                rows.append(long[k])
                continue
            ids, spans, unit = _assemble(*entry, parts)
            row = (ids, spans, unit if self.same_unit else units[k])
            if k in long and row != long[k]:
                raise FramesDiffer
            rows.append(row)
        return chunk.begin, rows


def _assemble(frame: Frame, first: int, joins: int, parts: list[Encoding]) -> Row:
    """The row of a frame whose contents, each behind its header, are ``parts[first:]``."""
    ids: list[int] = []
    spans: list[Span] = []
    unit = joins
    for i, header in enumerate(frame.header_ids):
        part = parts[first + i].ids
        ids += frame.closings[i]
        start = len(ids) + len(header)
        if part[: len(header)] != header:  # a content that changes the header's tokens is not what the probes showed
            raise FramesDiffer
        ids += part
        unit += len(part) - len(header)
        if frame.answers[i]:
            spans.append((start, len(ids) + 1))  # with the end of turn
    ids += frame.closings[-1]
    return ids, spans, unit


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
        if not messages[i].trained:
            continue
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
        message.with_content(f"\ue000{i}\ue001") if message.role == "assistant" else message
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


def _whole(chat: ChatTokenizer, text: str, encoding: Encoding, spans: list[Span]) -> tuple[list[int], list[Span]]:
    """(n,) ids of a rendered row and its trained spans in tokens.

    Decoding starts from the prompt's ids alone. Where a token of the whole text reaches across the border between
    prompt and last answer (``]{``), or the prompt's last tokens would be others without the answer behind them, the
    two are encoded apart, so that training and decoding see the same ids.
    """
    ids = encoding.ids
    tokens = [_token_span(encoding, ids, start, end) for start, end in spans]
    if spans and tokens[-1][0] < tokens[-1][1]:
        border, first = spans[-1][0], tokens[-1][0]
        begin = next((at for at in range(first - 1, -1, -1) if ids[at] in chat.added_ids), 0)
        tail = text[encoding.token_to_chars(begin)[0] if first else 0 : border]
        if ids[begin:first] != list(chat.encode_header(tail)):
            head, rest = chat.backend.encode_batch([text[:border], text[border:]], add_special_tokens=False)
            tokens = [_token_span(head, head.ids, start, end) for start, end in spans[:-1]]
            a, b = _token_span(rest, rest.ids, 0, spans[-1][1] - border)
            tokens.append((len(head.ids) + a, len(head.ids) + b))
            ids = head.ids + rest.ids
    return ids, tokens


def _token_span(encoding: Encoding, ids: list[int], start: int, end: int) -> Span:
    """Tokens [first, last) that hold the characters [start, end); characters the tokenizer drops are passed over."""
    while start < end and encoding.char_to_token(start) is None:
        start += 1
    while start < end and encoding.char_to_token(end - 1) is None:
        end -= 1
    if start >= end:
        return 0, 0
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    while last + 1 < len(ids) and encoding.token_to_chars(last + 1) == encoding.token_to_chars(last):
        last += 1  # one character in several byte tokens
    return first, last + 1
