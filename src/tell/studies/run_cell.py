"""Runs one cell to its end, on any machine."""

from __future__ import annotations

import platform
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tell.config import Config
from tell.data.general import refuse_absent
from tell.errors import Interrupted
from tell.files import write_text
from tell.folder import RunFolder
from tell.progress import Advance, Display
from tell.run.session import ModelCache
from tell.studies.separation_cells import run_separation


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell.

    Attributes:
        error: one line; None where it finished.
        trace: the traceback of an error that is not a `TellError`.
        host: where it ran.
    """

    error: str | None = None
    trace: str | None = None
    host: str = ""


def run_cell(
    folder: RunFolder,
    config: Config,
    *,
    separate: Mapping[str, Any] | None = None,
    keep_adapters: bool,
    display: Display,
    models: ModelCache | None = None,
) -> Outcome:
    """The outcome of running a cell, or of resuming one that was killed; exceptions become part of it.

    Args:
        folder: its run folder; the caller holds its lock.
        config: the configuration that its name is the hash of.
        separate: options of a cell that compares hidden states.
        keep_adapters: keep adapters and checkpoints of the finished cell.
        models: keeps the loaded model for the next cell.

    Raises:
        Interrupted: SIGINT or SIGTERM; the cell can be resumed.
    """
    from tell.run.tune import tune

    host = platform.node()
    try:
        if separate is not None:
            run_separation(folder, config, separate, display, models)
            return Outcome(host=host)
        refuse_absent(config.general)
        resume = _resumable(folder, config)
        config = config.model_copy(update={"out": str(folder.root)})
        tune(config, resume=resume, display=display, command="tell study", models=models)
    except Interrupted:
        raise
    except Exception as error:  # the other cells continue
        known = type(error).__module__.startswith("tell.")
        text = str(error) if known else f"{type(error).__name__}: {error}"
        trace = None if known else traceback.format_exc()
        return Outcome(" ".join(text.split()) or type(error).__name__, trace, host)
    if not keep_adapters:
        prune(folder)
    return Outcome(host=host)


def _resumable(folder: RunFolder, config: Config) -> bool:
    """Whether there is a run to resume; one that was killed before it began is removed."""
    if not folder.root.exists():
        return False
    if not (folder.config.exists() and folder.status.exists()):
        shutil.rmtree(folder.root)
        return False
    # The same name means the same run; its input files may have moved.
    write_text(folder.config, config.model_copy(update={"out": str(folder.root)}).to_yaml())
    return True


def prune(folder: RunFolder) -> None:
    """Delete adapters, readout and checkpoints, which are most of a finished cell's size."""
    for path in (folder.adapter, folder.arms):
        shutil.rmtree(path, ignore_errors=True)
    folder.readout.unlink(missing_ok=True)


class InnerDisplay:
    """Shows the progress of a cell at the end of the study's progress bar."""

    def __init__(self, advance: Advance, label: str) -> None:
        self.advance, self.label = advance, label

    def note(self, text: str) -> None:
        pass  # recorded in the cell's own findings

    @contextmanager
    def bar(self, title: str, total: float | None, unit: str = "rows") -> Iterator[Advance]:
        done = 0.0

        def advance(amount: float = 1, info: str = "", left: float | None = None) -> None:
            nonlocal done
            done += amount
            share = f" {min(1.0, done / total):.0%}" if total else ""
            self.advance(0, f"{self.label}: {title}{share}{', ' if info else ''}{info}")

        yield advance
