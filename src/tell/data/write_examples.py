"""Examples, or their prompts, written to a file that is read back as the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tell.data.example import Example, Message, tools_of
from tell.data.sources import load
from tell.data.unlabelled import load_prompts_of
from tell.errors import TellError
from tell.files import write_jsonl


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write JSON Lines: prompt and completion where every example is one question and its answer, else messages.

    Raises:
        TellError: an example would be read back as another one.
    """
    plain = all([m.role for m in e.messages] == ["user", "assistant"] and _is_plain(e.messages) for e in examples)
    write_jsonl(path, (_pair(e) if plain else _conversation(e.messages) for e in examples))
    back = load(str(path)).examples if examples else []
    for example, read in zip(examples, back, strict=False):
        if example.hash != read.hash:
            raise TellError("is read back as another row", where=example.origin, remedy="Remove the row.")
    if len(back) != len(examples):
        raise TellError(f"{len(examples) - len(back)} rows cannot be read back", where=str(path), remedy="Report this.")


def write_prompts(path: Path, examples: Sequence[Example]) -> None:
    """Write the prompts of examples to JSON Lines, as `tell.data.unlabelled.load_prompts_of` reads them back.

    Raises:
        TellError: a prompt would be read back as another one.
    """
    write_jsonl(path, (_conversation(example.prompt) for example in examples))
    back = load_prompts_of(str(path), {}).examples if examples else []
    if [example.prompt for example in back] != [example.prompt for example in examples]:
        raise TellError("prompts cannot be read back as they are", where=str(path), remedy="Report this.")


def _is_plain(messages: Sequence[Message]) -> bool:
    return all(message.is_plain for message in messages)


def _pair(example: Example) -> dict:
    question, answer = example.messages
    return {"prompt": question.content, "completion": answer.content}


def _conversation(messages: Sequence[Message]) -> dict:
    tools = tools_of(messages)
    return {"messages": [_turn(m) for m in messages], **({"tools": tools} if tools else {})}


def _turn(message: Message) -> dict:
    silent = message.role == "assistant" and not message.trained and not message.extra
    return {**message.to_dict(), **({"weight": 0} if silent else {})}
