"""A finished run opened again: configuration, anchor, tokenizer and model, for eval and chat."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tell.anchor.anchor import Anchor
from tell.config import ARMS, Config
from tell.errors import TellError, first_line
from tell.folder import RunFolder
from tell.models.find import ModelFiles, find_model
from tell.progress import Display, Silent
from tell.rows.template import ChatTokenizer
from tell.run.answers import adapter_folder, adapter_ready
from tell.run.claim import check_trust, read_run_config
from tell.run.record import dtype_name, thinks

# What to do where a cell of a study has none: a finished one is not run again as long as it is there.
CELL_ADAPTER = "for a cell of a study, remove the cell's folder and give `tell study` again with --keep-adapters."


class KeptModel:
    """The base model and engine that stay in memory from run to run; one at a time."""

    def __init__(self) -> None:
        self.key: tuple | None = None
        self.held: tuple[Any, Any] | None = None

    def drop(self) -> None:
        """Let go of it and of its GPU memory; the next run loads it anew."""
        held, self.key, self.held = self.held is not None, None, None
        gc.collect()
        if held:
            import torch

            torch.cuda.empty_cache()  # what torch keeps for itself, another engine would see as taken


_kept: list[KeptModel] = []  # the innermost `keep_model` is last


@contextmanager
def keep_model() -> Iterator[KeptModel]:
    """While this is open, runs of the same model share one copy of it, and its engine."""
    kept = KeptModel()
    _kept.append(kept)
    try:
        yield kept
    finally:
        _kept.remove(kept)
        kept.drop()


def load_engine(
    files: ModelFiles, config: Config, *, stream: bool = False, display: Display | None = None
) -> tuple[Any, Any]:
    """The base model, a `tell.models.load.Loaded`, and what decodes with it: an `Engine` or a `VllmEngine`.

    Args:
        stream: tokens are wanted one by one, as vLLM's offline engine does not give them.
        display: told that the model is being loaded.

    Raises:
        TellError: it cannot be loaded, its attention cannot be computed over packed rows, or vLLM is asked for and
            cannot be had.
    """
    with (display or Silent()).bar("load the model", None):  # importing torch and compiling kernels takes seconds too
        return _load_engine(files, config, stream)


def _load_engine(files: ModelFiles, config: Config, stream: bool) -> tuple[Any, Any]:
    from tell.decode.engine import Engine
    from tell.decode.vllm_engine import pick_engine
    from tell.models.load import choose_device, load_model

    settings = config.model
    choice = "own" if stream else pick_engine(config.generate.engine, str(choose_device(settings.device)))
    kept = _kept[-1] if _kept else KeptModel()
    rank = config.train.lora_r if choice == "vllm" else None  # vLLM is started for adapters of one size
    key = (files.path, files.fingerprint, settings.dtype, settings.device, settings.trust_remote_code, choice, rank)
    if kept.held is not None and kept.key == key:
        return kept.held
    kept.drop()  # before the next one is loaded: two may not fit
    loaded = load_model(
        files, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
    )
    engine = _vllm_engine(files, loaded, config) if choice == "vllm" else None
    if engine is None:
        engine = Engine(loaded.model, device=loaded.device, max_positions=files.architecture.max_positions)
    kept.key, kept.held = key, (loaded, engine)
    return loaded, engine


def _vllm_engine(files: ModelFiles, loaded: Any, config: Config) -> Any:
    """vLLM beside the loaded model; None, with a warning, where it was not asked for by name and does not start."""
    from tell.decode.vllm_engine import VllmEngine

    try:
        return VllmEngine(
            Path(files.path),
            loaded.model,
            max_positions=files.architecture.max_positions,
            dtype=dtype_name(loaded),
            rank=config.train.lora_r,
        )
    except Exception as error:  # whatever another engine's start may raise
        if config.generate.engine == "vllm":
            raise TellError(
                f"vLLM does not start ({first_line(error)})", where="generate.engine", remedy="Use generate.engine=own."
            ) from error
        warnings.warn(f"vLLM does not start ({first_line(error)}); answers are decoded without it", stacklevel=2)
        return None


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

    def load(self, config: Config | None = None, *, stream: bool = False, display: Display | None = None) -> Any:
        """The base model and its engine, loaded once; ``config`` (default: the run's) and ``stream`` choose it."""
        if self.loaded is None:
            config = config or self.config
            self.loaded, self.engine = load_engine(self.files, config, stream=stream, display=display)
        return self.loaded.model

    def adapter(self, arm: str) -> Path | None:
        """The adapter of an arm.

        Raises:
            TellError: unknown arm, or one this run did not train.
        """
        if arm not in ARMS:
            raise TellError(f"unknown arm {arm!r}", where="--arm", remedy=f"Use one of {', '.join(ARMS)}.")
        if not adapter_ready(self.folder, arm):
            raise TellError(
                f"this run has no adapter for the arm {arm}",
                where=str(self.folder.root),
                remedy=f"Run `tell tune` with --arms that include {arm}, or choose another arm; {CELL_ADAPTER}",
            )
        return adapter_folder(self.folder, arm)


def open_run(run: str | Path, *, trust_remote_code: bool = False) -> OpenRun:
    """Open a run folder.

    Args:
        trust_remote_code: run code that comes with the model. The folder may be somebody else's, so what its run.yaml
            says of trust counts for nothing.

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
