"""A finished run opened again: configuration, anchor, tokenizer and model, for eval and chat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tell.anchor.anchor import Anchor
from tell.config import ARMS, Config
from tell.errors import TellError
from tell.models.find import ModelFiles, find_model
from tell.rows.template import ChatTokenizer
from tell.run import RunFolder
from tell.study.folder import read_run_config
from tell.study.scoring import adapter_folder


def load_engine(files: ModelFiles, config: Config) -> tuple[Any, Any]:
    """The base model, a `tell.models.load.Loaded`, and the `tell.generate.engine.Engine` that decodes with it.

    Raises:
        TellError: it cannot be loaded, or its attention cannot be computed over packed rows.
    """
    from tell.generate.engine import Engine
    from tell.models.load import load_model

    settings = config.model
    loaded = load_model(
        files, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
    )
    engine = Engine(loaded.model, device=loaded.device, max_positions=files.architecture.max_positions)
    return loaded, engine


@dataclass
class OpenRun:
    """What eval and chat need of a run; the model is loaded by `load`."""

    folder: RunFolder
    config: Config
    anchor: Anchor
    files: ModelFiles
    chat: ChatTokenizer
    loaded: Any = None
    engine: Any = None

    def load(self) -> Any:
        """The base model and its engine, loaded once."""
        if self.loaded is None:
            self.loaded, self.engine = load_engine(self.files, self.config)
        return self.loaded.model

    def adapter(self, arm: str) -> Path | None:
        """The adapter of an arm.

        Raises:
            TellError: unknown arm, or one this run did not train.
        """
        if arm not in ARMS:
            raise TellError(f"unknown arm {arm!r}", where="--arm", remedy=f"Use one of {', '.join(ARMS)}.")
        place = adapter_folder(self.folder, arm)
        if place is not None and not (place / "adapter_model.safetensors").exists():
            raise TellError(
                f"this run has no adapter for the arm {arm}",
                where=str(self.folder.root),
                remedy=f"Run `tell tune` with --arms that include {arm}, or choose another arm.",
            )
        return place


def open_run(run: str | Path) -> OpenRun:
    """Open a run folder.

    Raises:
        TellError: no run there, or its model cannot be found.
    """
    folder = RunFolder(run)
    config = read_run_config(folder)
    anchor = Anchor.load(folder.require(folder.anchor, "`tell tune`"))
    files = find_model(
        config.model.name, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    return OpenRun(folder, config, anchor, files, ChatTokenizer(files.path))
