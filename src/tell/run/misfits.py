"""Notices about rows that do not fit the model as they are: cut, dropped, or all refused."""

from __future__ import annotations

from dataclasses import replace

from tell.config_sections import TrainConfig
from tell.data.sources import Loaded
from tell.errors import TellError
from tell.models.config_json import read_config
from tell.models.find import ModelFiles
from tell.rows.ends import ends_notice, foreign_end, without_ends
from tell.rows.render import has_thought
from tell.rows.row_table import RowTable
from tell.rows.template import ChatTokenizer
from tell.train.targets import refuse_experts


def cleaned(loaded: Loaded, chat: ChatTokenizer) -> tuple[Loaded, list[str]]:
    """The rows with written-out end tokens removed from their answers, and a notice of it."""
    examples, count = without_ends(loaded.examples, chat)
    notices = [ends_notice(loaded.path, count, chat)] if count else []
    if end := foreign_end(examples):
        notices.append(f"{loaded.path}: every answer ends in {end}, plain text to {chat.family}, and it is trained")
    return (replace(loaded, examples=examples) if count else loaded), notices


def fitted(
    data: Loaded, given: Loaded | None, files: ModelFiles, train: TrainConfig, *, own_code: bool = False
) -> tuple[Loaded, Loaded | None, ChatTokenizer, list[str]]:
    """The task's rows and test rows as the model takes them, its template, and the notices.

    Args:
        own_code: the model may run code that comes with it.

    Raises:
        TellError: ``train.lora_targets`` names experts.
    """
    chat = ChatTokenizer(files.path)
    data, notices = cleaned(data, chat)
    if given is not None:
        given, more = cleaned(given, chat)
        notices += more
    if any(has_thought(example.answer) for example in data.examples):
        chat = chat.thoughtful()
    if chat.thinking:
        notices.append(f"answers hold thoughts, so the chat template of {chat.family} is set to let the model think")
    notices += _experts_notice(files, train, own_code)
    return data, given, chat, notices


def _experts_notice(files: ModelFiles, train: TrainConfig, own_code: bool) -> list[str]:
    """Notices about the experts of a mixture; how custom code stores them is known only once weights are loaded."""
    count, targets = files.architecture.experts, train.lora_targets
    if count < 2 or (own_code and "auto_map" in read_config(files.path / "config.json")):
        return []
    refuse_experts(name.strip() for name in targets.split(","))
    return [f"a mixture of {count} experts: LoRA does not adapt the experts"] if targets == "all-linear" else []


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
            remedy="Use other general data.",
        )
