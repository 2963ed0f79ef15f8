"""The text of a training row from a conversation: prompt as in decoding, answer, end of turn.

Many templates write a conversation with its answer differently from the prompt for decoding: Mistral v0.3 moves the
system text to the last user turn if that is the last turn of all, R1 distills open a thought in the prompt alone.
A model trained on one and prompted with the other answers from a context it was never trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tell.data.example import Message
from tell.errors import TellError
from tell.rows.template import ChatTokenizer

Span = tuple[int, int]
THINK, DONE = "<think>", "</think>"
_TAG = re.compile(r"</?think>")
_SPACE = re.compile(r"\s*")
MOST_TURNS = 250_000  # rendered for the earlier answers of one row: 500 answers in 1,000 turns, about a second


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a row.

    Attributes:
        text: begins with the prompt of decoding.
        spans: [start, end) of the trained characters; the last one begins where the prompt ends.
        context: earlier answers without loss, since the row shows them differently from how decoding writes them.
    """

    text: str
    spans: list[Span]
    context: int


def render_row(chat: ChatTokenizer, messages: Sequence[Message]) -> Rendered:
    """Text and trained characters of a conversation that ends with an answer.

    A span is an answer with its end of turn; white space after that is not trained. What the template writes between
    the prompt and the answer is trained, since decoding must write it.

    A raw text (one turn, no prompt) is trained whole, with the end token after it and outside of the template.

    Raises:
        TellError: the template refuses the conversation, or loses a part of it; too many answers.
    """
    if len(messages) == 1:
        begin, text = chat.begin, f"{chat.begin}{messages[0].content}{chat.backend.id_to_token(chat.eos_ids[0])}"
        return Rendered(text, [(len(begin), len(text))], 0)
    earlier = earlier_answers(messages)
    prompt = chat.render(messages[:-1], add_generation_prompt=True)
    text, end = _with_answer(chat, messages, prompt)
    for message in messages[:-1]:
        if message.role in ("system", "user") and message.content.strip() not in prompt:
            raise _refused(
                chat,
                f"leaves out or changes the {message.role} text",
                "Write that text into the user turn, or train another model.",
            )
    spans: list[Span] = []
    context = 0
    for i in earlier:
        span = _earlier_answer(chat, messages[:i], messages[i].content, text)
        if span is None:
            context += 1
        else:
            spans.append(span)
    if messages[-1].trained and messages[-1].content.strip():
        spans.append((len(prompt), end))
    return Rendered(text, spans, context)


def earlier_answers(messages: Sequence[Message]) -> list[int]:
    """Indices of the trained answers before the last one; refuses so many that rendering them would take minutes."""
    first = next((i for i, m in enumerate(messages) if m.role == "user"), len(messages))  # a greeting is not a reply
    found = [
        i
        for i, m in enumerate(messages[:-1])
        if i > first and m.role == "assistant" and m.trained and m.content.strip()
    ]
    if (turns := sum(found)) > MOST_TURNS:
        raise TellError(
            f"has {len(found) + 1:,} answers to train in {len(messages):,} turns; to find them, {turns:,} turns would "
            f"be rendered, more than {MOST_TURNS:,}",
            remedy="Split the conversation, or set weight 0 on all answers but the last few.",
        )
    return found


def has_thought(text: str) -> bool:
    """Whether an answer holds a thought, as reasoning models write it."""
    return DONE in text


def _with_answer(chat: ChatTokenizer, messages: Sequence[Message], prompt: str) -> tuple[str, int]:
    """(the row's text, end of its trained part)."""
    content, turn = messages[-1].content, chat.end_of_turn
    full = chat.render(messages)
    natural = full.startswith(prompt)
    if natural and (at := _find(full, len(prompt), content, chat.lead)) is not None:
        if closed := _closed(full, at, turn):
            return full, closed
        text = full[: _over(full, at, content)] + turn  # no end that stops decoding: none to learn
        return text, len(text)
    pieces = _pieces(content)
    if (natural and len(pieces) < 2) or (pieces and pieces[-1] not in full):
        raise _refused(chat, "changes the answer's text", "Use the base model's default template or another one.")
    text = prompt + chat.lead + _behind(chat, prompt, content) + turn
    return text, len(text)


def _behind(chat: ChatTokenizer, prompt: str, content: str) -> str:
    """An answer as it continues a prompt that may have opened a thought."""
    header = prompt.rstrip()
    if has_thought(content) and header.endswith(DONE):
        raise _refused(
            chat,
            "closes the thought before the answer, and this answer contains a thought",
            "Remove the thoughts from the answers, or put one into a task row, so that the run thinks.",
        )
    if has_thought(content) and header.endswith(THINK):
        content = content.lstrip().removeprefix(THINK)
        content = content.lstrip("\n") if prompt != header else content
    return content.strip() if chat.trims else content


def _earlier_answer(chat: ChatTokenizer, before: Sequence[Message], content: str, text: str) -> Span | None:
    """Position of an earlier answer that is written as decoding would write it, else None."""
    try:
        head = chat.render(before, add_generation_prompt=True)
    except TellError:
        return None
    at = _find(text, len(head), content, chat.lead) if text.startswith(head) else None
    if at is None:
        return None
    return len(head), _closed(text, at, chat.end_of_turn) or _over(text, at, content)


def _find(text: str, start: int, content: str, lead: str) -> int | None:
    """End of an answer that begins at ``start``, its trailing white space not counted; None if it is not there.

    Templates trim answers and put thoughts on separate lines: of thoughts every word must be there.
    """
    for begin in (start + len(lead), start) if lead and text.startswith(lead, start) else (start,):
        if text.startswith(content.rstrip(), begin):
            return begin + len(content.rstrip())
        begin = _past_space(text, begin)
        if text.startswith(content.strip(), begin):
            return begin + len(content.strip())
    if not has_thought(content):
        return None
    at = start
    for piece in _pieces(content):
        found = text.find(piece, at)
        if found < 0 or _TAG.sub("", text[at:found]).strip():
            return None
        at = found + len(piece)
    return at


def _pieces(content: str) -> list[str]:
    """Thought and answer without their tags."""
    return [piece for part in _TAG.split(content) if (piece := part.strip())]


def _closed(text: str, at: int, turn: str) -> int | None:
    """End of the end-of-turn text after an answer that ends at ``at``."""
    end = _past_space(text, at)
    return end + len(turn) if text.startswith(turn, end) else None


def _past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _over(text: str, at: int, content: str) -> int:
    """``at`` moved past the white space that the answer itself ends with."""
    space = content[len(content.rstrip()) :]
    return at + len(space) if text.startswith(space, at) else at


def _refused(chat: ChatTokenizer, what: str, remedy: str) -> TellError:
    return TellError(f"the chat template of {chat.family} {what}", where=str(chat.folder), remedy=remedy)
