"""What is said of rows that do not fit the model as they are: cut, dropped, or all of them refused."""

from __future__ import annotations

from dataclasses import replace

from tell.data.sources import Loaded
from tell.errors import TellError
from tell.models.find import ModelFiles
from tell.rows.ends import ends_notice, foreign_end, without_ends
from tell.rows.render import has_thought
from tell.rows.table import RowTable
from tell.rows.template import ChatTokenizer


def cleaned(loaded: Loaded, chat: ChatTokenizer) -> tuple[Loaded, list[str]]:
    """The rows without end tokens written into their answers, and what to say of it."""
    examples, count = without_ends(loaded.examples, chat)
    notices = [ends_notice(loaded.path, count, chat)] if count else []
    if end := foreign_end(examples):
        notices.append(f"{loaded.path}: every answer ends in {end}, plain text to {chat.family}, and it is trained")
    return (replace(loaded, examples=examples) if count else loaded), notices


def fitted(
    data: Loaded, given: Loaded | None, files: ModelFiles, targets: str
) -> tuple[Loaded, Loaded | None, ChatTokenizer, list[str]]:
    """The task's rows and test rows as the model takes them, its template, and what to say of it.

    Args:
        targets: ``train.lora_targets``.
    """
    chat = ChatTokenizer(files.path)
    data, notices = cleaned(data, chat)
    if given is not None:
        given, more = cleaned(given, chat)
        notices += more
    if any(has_thought(example.answer) for example in data.examples):
        chat = chat.thoughtful()
    if chat.thinking:
        notices.append(f"answers hold thoughts, so the chat template of {chat.family} is told to let the model think")
    if files.architecture.experts > 1 and targets == "all-linear":
        notices.append(f"a mixture of {files.architecture.experts} experts: LoRA leaves the experts as they are")
    return data, given, chat, notices


def check_general(table: RowTable, source: str) -> None:
    """Refuse general data without a row that can be trained on.

    Raises:
        TellError: there is none.
    """
    if table.dropped and not len(table):
        first, total = table.dropped[0], len(table.dropped)
        raise TellError(
            f"none of the {total:,} general rows can be trained on; the first: {first.reason}",
            where=first.origin or source,
            remedy="Give other general data.",
        )
