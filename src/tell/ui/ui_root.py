"""The folder that a page is about: its runs, studies and uploads. What the page remembers is in files here."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from tell.data.formats import FORMATS_TEXT, format_of
from tell.errors import TellError
from tell.files import atomic_path, parse_yaml, read_json, read_text
from tell.folder import RunFolder
from tell.home import make_folder
from tell.shown import brief
from tell.studies.study_folder import StudyFolder

MOST_UPLOAD = 256 << 20  # bytes
MOST_FOLDERS, DEEPEST = 20_000, 5  # that are searched for runs
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
        if set(os.listdir(path := self._inside(name))) >= RUN:
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
            name = self.name(Path(at))
            if is_run := set(files) >= RUN:
                runs.append(name)
            elif "study.json" in files:
                studies.append(name)
            ends = is_run or number >= MOST_FOLDERS or name.count("/") >= DEEPEST - 1
            inner[:] = [] if ends else [folder for folder in inner if not folder.startswith(".")]
        return sorted(runs), sorted(studies)

    def fresh_run(self, data: str) -> str:
        """``runs/<data>-<n>`` with the first n that is free."""
        stem = re.sub(r"[^\w.-]+", "-", Path(data).name.split(".")[0]).strip("-.") or "run"
        names = (f"runs/{stem}-{n}" for n in count(1))
        return next(name for name in names if not (self.path / name).exists())

    def uploaded(self) -> list[str]:
        """Files that were dropped onto the page, the newest first, as paths under the root."""
        files = list(self.uploads.glob("[!.]*")) if self.uploads.is_dir() else []
        return [self.name(path) for path in sorted(files, key=lambda path: -path.stat().st_mtime)[:200]]

    async def receive(self, name: str, parts: AsyncIterator[bytes]) -> str:
        """Keep an upload under a cleaned name that is free; returns its path under the root.

        Raises:
            TellError: the format is unknown, it is too large, or it cannot be written. Nothing is kept then.
        """
        cleaned, size = clean_name(name), 0
        paths = (make_folder(self.uploads) / (f"{n}-{cleaned}" if n else cleaned) for n in count())
        path = next(path for path in paths if not path.exists())
        with atomic_path(path) as temporary, temporary.open("wb") as out:
            async for part in parts:
                if (size := size + len(part)) > MOST_UPLOAD:
                    what = f"is larger than {MOST_UPLOAD >> 20} MB"
                    raise TellError(what, where=cleaned, remedy="Copy it here yourself and name its path.")
                out.write(part)
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
    return (re.sub(r"[^\w-]+", "-", name[: -len(suffix)]).strip("-")[:100] or "data") + suffix


def read_facts(path: Path) -> dict[str, Any]:
    """A JSON or YAML file; empty where it is missing or damaged."""
    with suppress(OSError, ValueError, TellError):
        yaml = path.suffix == ".yaml"
        found = parse_yaml(read_text(path, remedy=""), where=path.name) if yaml else read_json(path, remedy="")
        return found if isinstance(found, dict) else {}
    return {}
