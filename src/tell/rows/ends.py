"""End tokens written into answers: data made for another trainer often has one at the end of each text.

The chat template writes the end token; a second one after it would be trained but never decoded, and a reference with
one equals no decoded answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from tell.data.example import Example, Message
from tell.rows.template import ChatTokenizer

# End tokens of published families. One after every answer that is not the model's own was written for another model.
FOREIGN = ("</s>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "<eos>", "<|end|>")


def without_ends(examples: Sequence[Example], chat: ChatTokenizer) -> tuple[list[Example], int]:
    """The examples without stop tokens at the end of answers, and how many examples had one."""
    ends = tuple(token for i in chat.stop_ids if i in chat.added_ids and (token := chat.backend.id_to_token(i)))
    kept: list[Example] = []
    changed = 0
    for example in examples:
        turns = example.messages
        if ends and any(m.role == "assistant" and m.content.rstrip().endswith(ends) for m in turns):
            turns = tuple(_cut(turn, ends) for turn in turns)
            example = Example.of(turns, source=example.source, origin=example.origin)
            changed += 1
        kept.append(example)
    return kept, changed


def _cut(turn: Message, ends: tuple[str, ...]) -> Message:
    text = turn.content
    while turn.role == "assistant" and (bare := text.rstrip()).endswith(ends):
        text = bare.removesuffix(next(end for end in ends if bare.endswith(end)))
    return turn if text == turn.content else turn.with_content(text)


def foreign_end(examples: Sequence[Example]) -> str | None:
    """The end token of another model after all the answers, once the model's own are removed."""
    found = (end for end in FOREIGN if examples and all(e.answer.rstrip().endswith(end) for e in examples))
    return next(found, None)


def ends_notice(path: str, count: int, chat: ChatTokenizer) -> str:
    """A notice about answers that were cut."""
    return (
        f"{path}: the end token at the end of the answers of {count:,} rows is removed; the chat template of "
        f"{chat.family} writes it"
    )
