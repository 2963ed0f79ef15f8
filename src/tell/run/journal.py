"""status.json of a run in progress: its stage, its seconds, how it ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tell.config import Config
from tell.errors import Interrupted
from tell.folder import RunFolder
from tell.run.claim import open_folder
from tell.run.stop import Stop


@dataclass
class Journal:
    """Records the stage and time of a run, and raises once it is to stop.

    Attributes:
        begin: start of this session, on the monotonic clock in seconds.
        earlier: seconds of the sessions before this one.
    """

    folder: RunFolder
    stop: Stop
    begin: float = field(default_factory=time.monotonic)
    earlier: float = 0.0
    stage: str = "start"

    @classmethod
    def of(cls, folder: RunFolder, *, resumed: bool = False) -> Journal:
        """The journal of a run in a folder; a resumed one continues counting seconds."""
        earlier = float(folder.read_status().get("seconds", 0)) if resumed else 0.0
        return cls(folder, Stop(folder.root), earlier=earlier)

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, over all its sessions."""
        return self.earlier + time.monotonic() - self.begin

    @property
    def spent(self) -> float:
        """Seconds of this session."""
        return time.monotonic() - self.begin

    def at(self, stage: str) -> None:
        """Enter a stage.

        Raises:
            Interrupted: a signal was received.
        """
        self.stage = stage
        self.stop.check()
        self.set("running")

    def set(self, state: str, **more: object) -> None:
        """Write status.json, with the seconds that a resumed run continues from."""
        self.folder.set_status(state, stage=self.stage, seconds=round(self.seconds, 1), **more)

    @contextmanager
    def open(self, config: Config, *, fresh: bool = True, overwrite: bool = False) -> Iterator[None]:
        """Lock the run's folder, listen for signals, and record how the run ended."""
        opened = open_folder(self.folder, fresh=fresh, config=config, seconds=self.seconds, overwrite=overwrite)
        with opened, self.stop.listening():
            try:
                yield
            except (Interrupted, KeyboardInterrupt):
                self.set("interrupted")
                raise
            except BaseException as error:
                self.set("failed", error=str(error) or type(error).__name__)
                raise
            self.stage = "done"
            self.set("done")
