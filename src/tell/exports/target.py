"""Export targets by name. To add one, put a module ``to_<name>.py`` into this folder::

@export_target("mine")
class Mine(Target): ...
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Protocol

import tell.exports
from tell.anchor.anchor import Anchor
from tell.config_sections import GenerateConfig
from tell.data.example import Message
from tell.errors import TellError, did_you_mean
from tell.folder import AdapterFolder
from tell.models.architecture import weight_files
from tell.registry import Registry
from tell.rows.prelude import Shots, with_anchor
from tell.rows.template import ChatTokenizer
from tell.run.claim import Trust
from tell.run.task import Notices
from tell.verbs.open_run import OpenRun


@dataclass(frozen=True)
class Source:
    """What is exported: one arm of a finished run.

    Attributes:
        arm: whose adapter and anchor.
        adapter: folder of that adapter.
        shots: turns of the run's fixed examples, as `with_anchor` takes them; None where there are none.
        generate: how the arm decodes.
        most_tokens: most new tokens of an answer.
        notices: everything that is left out or guessed.
    """

    opened: OpenRun
    arm: str
    adapter: AdapterFolder
    anchor: Anchor
    shots: Shots | None
    generate: GenerateConfig
    most_tokens: int
    notices: Notices = field(default_factory=Notices)

    @property
    def chat(self) -> ChatTokenizer:
        return self.opened.chat

    @property
    def base(self) -> Path:
        """Folder of the base model's files."""
        return self.opened.files.path

    @property
    def name(self) -> str:
        """Of the model to be served: the run folder's, and the arm's where it is not ``tell``."""
        run = self.opened.folder.root.resolve().name.replace("=", "-")  # vLLM writes NAME=FOLDER
        return run if self.arm == "tell" else f"{run}-{self.arm}"

    def template(self, *, force_thinking: bool = False) -> str:
        """The chat template that renders a conversation as the run does (`tell.rows.prelude.with_anchor`)."""
        chat = self.chat
        return with_anchor(
            chat.template,
            self.anchor,
            thinking=chat.thinking,
            force_thinking=force_thinking,
            shots=self.shots,
            special=chat.special,
        )

    def weights_size(self) -> int:
        """Bytes of the base model's weights."""
        return sum(file.stat().st_size for file in weight_files(self.base))


@dataclass(frozen=True)
class ExportOptions:
    """What only some targets read.

    Attributes:
        quant: weights of a GGUF file: ``q8_0``, ``f16``, ``bf16`` or ``q4_k_m``.
        llama_cpp: folder of llama.cpp with its converter.
        repo: ``user/name`` of the hub repository.
        public: make that repository public.
        merged: upload the merged model to the hub instead of the adapter.
        trust: third-party code that may run. The folder may be somebody else's, so run.yaml alone does not allow it.
    """

    quant: str = "q8_0"
    llama_cpp: Path | None = None
    repo: str | None = None
    public: bool = False
    merged: bool = False
    trust: Trust = field(default_factory=Trust)


class Reader(Protocol):
    """An artefact opened again by another runtime, from its folder alone."""

    @property
    def runtime(self) -> str:
        """Its name and version."""
        ...

    def prompt_ids(self, turns: Sequence[Message]) -> list[int]:
        """Token ids of a conversation rendered by the artefact's own template, with the header of an answer."""
        ...

    def answer(self, ids: Sequence[int], source: Source) -> str:
        """The greedy answer to a prompt, as `ChatTokenizer.answer` writes answers."""
        ...


class Target:
    """A form in which a run leaves the house. Methods that a target has no need of stay as they are here.

    Attributes:
        about: one line for the help.
    """

    about = ""

    def ready(self, source: Source, options: ExportOptions) -> None:
        """Refuse what cannot be exported, before anything is written.

        Raises:
            TellError: a tool or an option is missing.
        """

    def size(self, source: Source, options: ExportOptions) -> int:
        """Bytes that are written at most, temporary files included."""
        raise NotImplementedError

    def write(self, source: Source, options: ExportOptions, folder: Path) -> dict:
        """Write the artefact into an empty folder.

        Returns:
            What export.json says about it, besides the check.
        """
        raise NotImplementedError

    def reopen(self, source: Source, folder: Path) -> AbstractContextManager[Reader] | str:
        """A reader of what was written, or why there is none here."""
        return "there is no runtime for it here"

    def finish(self, source: Source, options: ExportOptions, folder: Path) -> list[str]:
        """Called with the final folder after the check has passed; returns lines for the user, e.g. what to type."""
        return []


export_target = Registry[type[Target]]("export target")


@cache
def export_targets() -> dict[str, type[Target]]:
    """Every target of this folder by name; a module ``to_*`` that registers none is an error."""
    for name in _modules():
        place = import_module(f"tell.exports.{name}")
        if not any(target.__module__ == place.__name__ for target in export_target.values()):
            raise ValueError(f"{place.__name__} registers no export target")
    return export_target


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        TellError: there is none.
    """
    known = export_targets()
    if name not in known:
        remedy = f"Use one of {', '.join(sorted(known))}."
        raise TellError(f"unknown target {name!r}", where="--to", remedy=remedy, nearest=did_you_mean(name, known))
    return known[name]()


def _modules() -> Iterator[str]:
    return (m.name for m in pkgutil.iter_modules(tell.exports.__path__) if m.name.startswith("to_"))
