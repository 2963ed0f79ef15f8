"""Reopens a finished run: configuration, anchor, tokenizer and model, for the verbs that use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, model_validator

from tell.anchor.anchor import Anchor
from tell.config import Config
from tell.data.form import CellType, Form, form_of
from tell.errors import TellError
from tell.files import DAMAGED, read_json
from tell.folder import AdapterFolder, RunFolder
from tell.models.find import ModelFiles, find_model
from tell.names import ARMS
from tell.progress import Display, Silent
from tell.readout.readout import Readout
from tell.rows.template import ChatTokenizer
from tell.run.answers import adapter_folder, adapter_ready
from tell.run.arms import Chosen
from tell.run.claim import REMAKE, check_trust, read_run_config
from tell.run.readouts import Decider
from tell.run.record import thinks
from tell.run.search_record import chosen_settings
from tell.run.session import Session

CELL_ADAPTER = f"for a cell of a study, {REMAKE[0].lower()}{REMAKE[1:]}"

AS_IT_WAS = "Put the model back as it was (model.revision pins one of the hub), or run `tell tune` again."


class _Form(BaseModel):
    """``form`` of findings.json."""

    prompt: str
    answer: tuple[str, ...] = Field(min_length=1)
    types: tuple[CellType, ...]

    @model_validator(mode="after")
    def _a_type_each(self) -> _Form:
        if len(self.types) != len(self.answer):
            raise ValueError("types of another number of columns")
        return self


class _Data(BaseModel):
    """``data`` of findings.json."""

    form: _Form | None = None


class _Findings(BaseModel):
    """The part of findings.json that says how the data were read."""

    data: _Data


@dataclass(frozen=True)
class OpenRun:
    """A reopened finished run."""

    folder: RunFolder
    config: Config
    anchor: Anchor
    files: ModelFiles
    chat: ChatTokenizer

    def session(self, config: Config | None = None, display: Display | None = None, *, stream: bool = False) -> Session:
        """A session of its model; ``config`` (default: the run's) sets device and engine, ``stream`` streaming."""
        return Session(self.files, config or self.config, self.chat, display or Silent(), stream=stream)

    @property
    def chosen(self) -> Chosen:
        """What the run's search chose, by arm."""
        return chosen_settings(self.folder)

    @property
    def read_by(self) -> str | Form | None:
        """How the run read its data, as `tell.data.sources.load` takes it: guesses and types are the run's own."""
        if self.folder.findings.exists():
            form = self.folder.read_as(self.folder.findings, _Findings).data.form
            if form is not None:
                return Form(form.prompt, form.answer, form.types)
        return form_of(self.config.task) or self.config.task.columns

    def decides(self, config: Config) -> bool:
        """Whether closed fields are decided: the run has a readout, and ``generate.closed`` is not off."""
        return config.generate.closed != "off" and self.folder.readout.exists()

    def decider(self, session: Session) -> Decider | None:
        """What decides the closed fields; None where nothing does.

        Raises:
            TellError: the readout is damaged, or of another model.
        """
        if not self.decides(session.config):
            return None
        return Decider.of(Readout.load(self.folder.readout), session)

    def adapter(self, arm: str) -> Path | None:
        """The adapter of an arm.

        Raises:
            TellError: unknown arm, one this run did not train, or the base model's weights are others now.
        """
        if arm not in ARMS:
            raise TellError(f"unknown arm {arm!r}", where="--arm", remedy=f"Use one of {', '.join(ARMS)}.")
        if not adapter_ready(self.folder, arm):
            raise TellError(
                f"this run has no adapter for the arm {arm}",
                where=str(self.folder.root),
                remedy=f"Run `tell tune` with --arms that include {arm}, or choose another arm; {CELL_ADAPTER}",
            )
        place = adapter_folder(self.folder, arm)
        if place is not None:
            self._check_weights(AdapterFolder(place))
        return place

    def _check_weights(self, adapter: AdapterFolder) -> None:
        """Refuse to put an adapter on other weights than it was trained on, where its notes know these."""
        notes = read_json(adapter.notes, remedy=DAMAGED) if adapter.notes.exists() else {}
        known = notes.get("base_weights")
        if known and known != self.files.weights:
            raise TellError(
                "its weights changed since this run was trained", where=str(self.files.path), remedy=AS_IT_WAS
            )


def open_run(run: str | Path, *, trust_remote_code: bool = False) -> OpenRun:
    """A finished run, opened from its folder.

    Args:
        trust_remote_code: run code that comes with the model. The folder may be somebody else's, so its run.yaml
            alone does not allow it.

    Raises:
        TellError: no run there, its model cannot be found, or it was made with code that is not trusted now.
    """
    folder = RunFolder(run)
    config = read_run_config(folder)
    check_trust(folder, config, code=trust_remote_code)
    anchor = Anchor.load(folder.require(folder.anchor, "`tell tune`"))
    files = find_model(config.model.name, revision=config.model.revision, trust_remote_code=trust_remote_code)
    chat = ChatTokenizer(files.path)
    return OpenRun(folder, config, anchor, files, chat.thoughtful() if thinks(folder) else chat)
