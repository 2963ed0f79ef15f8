"""The folder that a page is about: its runs, studies and uploads. What the page remembers is in files here."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import count
from pathlib import Path

from anyio import from_thread, to_thread

from tell.data.formats import FORMATS_TEXT, format_of
from tell.errors import TellError
from tell.files import atomic_path, claim_path, stamp
from tell.folder import RunFolder
from tell.home import make_folder
from tell.shown import brief
from tell.studies.study_folder import StudyFolder

MOST_UPLOAD = 256 << 20  # bytes
MOST_NAME = 100  # bytes of a name; file systems take 255, and some of them are added to it
MOST_FOLDERS, DEEPEST = 20_000, 5  # that are searched for runs
FULL = "Free disk space, or name another folder: tell ui ROOT"
RUN = {"run.yaml", "status.json"}


class NotHere(TellError):
    """There is no such run, study or page."""


class UiRoot:
    """The root folder of a page. Creating the object touches nothing on disk.

    Attributes:
        state: folder of the page itself: its lock, token and address, and the processes that it started.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        self.state = self.path / ".tell-ui"
        self.uploads = self.path / "uploads"

    def _inside(self, name: str) -> Path:
        """A folder under the root by its name, which may come from anybody."""
        with suppress(OSError, ValueError):
            path = (self.path / name).resolve()
            if path != self.path and path.is_relative_to(self.path) and path.is_dir():
                return path
        raise NotHere(f"there is no {brief(name)} here")

    def run(self, name: str) -> RunFolder:
        """A run by its path under the root.

        Raises:
            NotHere: the path leads out of the root, or to no run.
        """
        path = self._inside(name)
        with suppress(OSError):  # it has just been removed
            if set(os.listdir(path)) >= RUN:
                return RunFolder(path)
        raise NotHere(f"{brief(name)} is not a run")

    def study(self, name: str) -> StudyFolder:
        """A study by its path under the root, as `run`."""
        if (folder := StudyFolder(self._inside(name))).state.is_file():
            return folder
        raise NotHere(f"{brief(name)} is not a study")

    def name(self, path: Path) -> str:
        """The path under the root that names a run or study."""
        return path.relative_to(self.path).as_posix()

    def find(self) -> tuple[list[str], list[str]]:
        """Names of the runs and of the studies; links to other folders are not followed."""
        runs, studies = [], []
        for number, (at, inner, files) in enumerate(os.walk(self.path)):
            name = at[len(str(self.path)) :].replace(os.sep, "/").lstrip("/") or "."  # of thousands: no Path for each
            if is_run := set(files) >= RUN:
                runs.append(name)
            elif "study.json" in files:
                studies.append(name)
            ends = is_run or number >= MOST_FOLDERS or name.count("/") >= DEEPEST - 1
            inner[:] = [] if ends else [folder for folder in inner if not folder.startswith(".")]
        return sorted(runs), sorted(studies)

    def fresh_run(self, data: str) -> str:
        """``runs/<data>-<n>`` with the first n that is free."""
        stem = _short(re.sub(r"[^\w.-]+", "-", Path(data).name.split(".")[0])) or "run"
        names = (f"runs/{stem}-{n}" for n in count(1))
        return next(name for name in names if not (self.path / name).exists())

    def uploaded(self) -> list[str]:
        """Files that were dropped onto the page, the newest first, as paths under the root."""
        stamps = {path: stamp(path) for path in self.uploads.glob("[!.]*")}
        found = [path for path in stamps if stamps[path][1]]  # else it is gone, or only claimed as yet
        return [self.name(path) for path in sorted(found, key=stamps.__getitem__, reverse=True)[:200]]

    async def receive(self, name: str, parts: AsyncIterator[bytes]) -> str:
        """Keep an upload under a cleaned name that is free; returns its path under the root.

        Raises:
            TellError: the format is unknown, it is too large, or it cannot be written. Nothing is kept then.
        """
        return await to_thread.run_sync(self._keep, clean_name(name), parts)  # the event loop waits for no disk

    def _keep(self, cleaned: str, parts: AsyncIterator[bytes]) -> str:
        path, size = claim_path(make_folder(self.uploads) / cleaned), 0
        try:
            with atomic_path(path) as temporary, temporary.open("wb") as out:
                while (part := from_thread.run(anext, parts, None)) is not None:
                    if (size := size + len(part)) > MOST_UPLOAD:
                        what = f"is larger than {MOST_UPLOAD >> 20} MB"
                        raise TellError(what, where=cleaned, remedy="Copy it here yourself and name its path.")
                    out.write(part)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return self.name(path)


def clean_name(name: str) -> str:
    """The name of an upload: letters, digits, ``._-`` and no path.

    Raises:
        TellError: its format is none that is read.
    """
    name = unicodedata.normalize("NFC", name).replace("\\", "/").rpartition("/")[2]
    if (known := format_of(name)) is None:
        raise TellError("has a format that is not read", where=brief(name), remedy=f"The formats are {FORMATS_TEXT}.")
    suffix = "".join(known)
    return (_short(re.sub(r"[^\w-]+", "-", name[: -len(suffix)])) or "data") + suffix


def _short(name: str) -> str:
    return name.encode()[:MOST_NAME].decode("utf-8", "ignore").strip("-.")
