"""Experiment trackers that training steps are reported to, through the trackers of accelerate.

A tracker is never worth a training run: one that cannot start or raises later is turned off, and that is said.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tell.config_sections import TrackerName
from tell.errors import first_line

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "tell"
WANDB_PATIENCE = 30.0  # seconds that W&B's server may take before the run goes on offline
MLFLOW_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Unless the user says otherwise: by MLflow's own, a server that is gone holds training up for minutes."""
Note = Callable[[str], None]


@dataclass(frozen=True)
class Reported:
    """What a tracker is started for: the training of one arm.

    Attributes:
        log: the JSON Lines file of its steps, ``RUN/logs/ARM.jsonl``.
        keep: steps of an earlier session that stay.
    """

    log: Path
    keep: int = 0
    note: Note = field(default=lambda text: None, repr=False)

    @property
    def group(self) -> str:
        """The run's name."""
        return self.log.resolve().parent.parent.name

    @property
    def name(self) -> str:
        """The run's and the arm's name."""
        return f"{self.group}/{self.log.stem}"


@dataclass(frozen=True)
class TrackerKind:
    """A tracker.

    Attributes:
        start: makes it and starts it.
        settings: it is given the training settings; TensorBoard would write them to files of their own.
    """

    start: Callable[[Reported], GeneralTracker]
    settings: bool = True


def _tensorboard(run: Reported) -> GeneralTracker:
    """Event files in ``RUN/logs/ARM``."""
    from accelerate.tracking import TensorBoardTracker

    return _started(TensorBoardTracker(run.log.stem, run.log.parent, purge_step=run.keep + 1))


def _wandb(run: Reported) -> GeneralTracker:
    """A run of the project ``tell`` (or WANDB_PROJECT), offline where W&B has no login here or cannot be reached."""
    import wandb
    from accelerate.tracking import WandBTracker

    def start(mode: str | None) -> GeneralTracker:
        settings = wandb.Settings(init_timeout=WANDB_PATIENCE, silent=True, console="off")
        more: dict[str, Any] = {"mode": mode} if mode else {}
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            group=run.group,
            dir=str(run.log.parent),
            settings=settings,
            **more,
        )
        return _started(tracker)

    if os.environ.get("WANDB_MODE"):
        return start(None)
    try:
        if wandb.login(prompt=False, verify=False):
            return start(None)
        why = "no login on this machine (`wandb login`)"
    except Exception as error:  # of its client: a bad key, no network
        why = first_line(error)
    run.note(f"wandb: {why}, so the run is kept in {run.log.parent}/wandb; `wandb sync` uploads it")
    return start("offline")


def _mlflow(run: Reported) -> GeneralTracker:
    """A run of the experiment ``tell`` (or MLFLOW_EXPERIMENT_NAME), where MLFLOW_TRACKING_URI says."""
    for name, value in MLFLOW_LIMITS.items():
        os.environ.setdefault(name, value)
    from accelerate.tracking import MLflowTracker

    return _started(MLflowTracker(PROJECT, run_name=run.name))


def _trackio(run: Reported) -> GeneralTracker:
    """A run of the project ``tell`` in trackio's own folder (TRACKIO_DIR)."""
    from accelerate.tracking import TrackioTracker

    return _started(TrackioTracker(PROJECT, name=run.name, group=run.group, embed=False))


def _started(tracker: GeneralTracker) -> GeneralTracker:
    from accelerate.state import PartialState

    PartialState()  # accelerate's logger raises without it
    tracker.main_process_only = False  # we are in the one process that reports
    tracker.start()
    return tracker


TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": TrackerKind(_tensorboard, settings=False),
    "wandb": TrackerKind(_wandb),
    "mlflow": TrackerKind(_mlflow),
    "trackio": TrackerKind(_trackio),
}
if set(TRACKERS) != set(get_args(TrackerName)):
    raise ValueError("train.report_to and the trackers differ")


def missing_trackers(names: Sequence[str]) -> list[str]:
    """A sentence for each tracker that is requested and not installed."""
    said = {"tensorboard": "no TensorBoard files are written; to have them"}
    return [
        f'{said.get(name, f"nothing is reported to {name}; to have it")}, pip install "tell-llm[{name}]"'
        for name in names
        if find_spec(name) is None
    ]


class Trackers:
    """The trackers of one training run that work."""

    def __init__(self, names: Sequence[str], run: Reported, settings: Mapping[str, Any]) -> None:
        self.note = run.note
        self.open: dict[str, GeneralTracker] = {}
        known = {key: str(value) if isinstance(value, list) else value for key, value in settings.items()}
        for name in dict.fromkeys(names):
            if find_spec(name) is None:  # said before training
                continue
            self._try(name, partial(self._start, name, run, known))

    def _start(self, name: str, run: Reported, settings: dict[str, Any]) -> None:
        kind = TRACKERS[name]
        self.open[name] = kind.start(run)
        if kind.settings:
            self.open[name].store_init_configuration(settings)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Report numbers of a step."""
        for name, tracker in list(self.open.items()):
            self._try(name, partial(tracker.log, dict(values), step=step))

    def close(self) -> None:
        """End the runs."""
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.finish)
        self.open.clear()

    def _try(self, name: str, call: Callable[[], object]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # some print, and stdout is for results
                call()
        except Exception as error:  # whatever a tracker raises, the training goes on
            self.open.pop(name, None)
            self.note(f"{name} is turned off and the training goes on: {type(error).__name__}: {first_line(error)}")
