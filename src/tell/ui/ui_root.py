"""The folder that a page is about: its runs, studies and uploads. What the page remembers is in files here."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import unquote

from tell.data.formats import FORMATS_TEXT, format_of
from tell.errors import TellError
from tell.files import atomic_path, unwritable
from tell.folder import RunFolder
from tell.home import make_folder
from tell.shown import brief
from tell.studies.study_folder import StudyFolder

MOST_UPLOAD = 256 << 20  # bytes
MOST_FOLDERS, DEEPEST = 20_000, 5  # that are searched for runs
LONGEST_NAME = 100


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

    def inside(self, name: str) -> Path:
        """A path under the root by its name, which may come from anybody.

        Raises:
            NotHere: it leads out of the root, or nowhere.
        """
        try:
            path = (self.path / name).resolve()
            if path != self.path and path.is_relative_to(self.path) and path.exists():
                return path
        except (OSError, ValueError):
            pass
        raise NotHere(f"there is no {brief(name)} here")

    def run(self, name: str) -> RunFolder:
        """A run by its path under the root."""
        if is_run(path := self.inside(name)):
            return RunFolder(path)
        raise NotHere(f"{brief(name)} is not a run")

    def study(self, name: str) -> StudyFolder:
        """A study by its path under the root."""
        folder = StudyFolder(self.inside(name))
        if folder.state.is_file():
            return folder
        raise NotHere(f"{brief(name)} is not a study")

    def find(self) -> tuple[list[str], list[str]]:
        """Names of the runs and of the studies; links to other folders are not followed."""
        runs, studies = [], []
        for path, files in self._folders():
            name = path.relative_to(self.path).as_posix()
            if {"run.yaml", "status.json"} <= files:
                runs.append(name)
            elif "study.json" in files:
                studies.append(name)
        return sorted(runs), sorted(studies)

    def _folders(self) -> Iterator[tuple[Path, set[str]]]:
        for number, (at, inner, files) in enumerate(os.walk(self.path)):
            path = Path(at)
            found = set(files)
            if number >= MOST_FOLDERS or is_run(path) or len(path.relative_to(self.path).parts) >= DEEPEST:
                inner.clear()
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            if path != self.path:
                yield path, found

    def fresh_run(self, data: str) -> str:
        """``runs/<data>-<n>`` with the first n that is free."""
        stem = re.sub(r"[^\w.-]+", "-", Path(data).name.split(".")[0]).strip("-.") or "run"
        n = 1
        while (self.path / "runs" / f"{stem}-{n}").exists():
            n += 1
        return f"runs/{stem}-{n}"

    def uploaded(self) -> list[str]:
        """Files that were dropped onto the page, the newest first, as paths under the root."""
        if not self.uploads.is_dir():
            return []
        files = [path for path in self.uploads.iterdir() if path.is_file() and not path.name.startswith(".")]
        files.sort(key=lambda path: -path.stat().st_mtime)
        return [path.relative_to(self.path).as_posix() for path in files[:200]]

    async def receive(self, name: str, parts: AsyncIterator[bytes]) -> str:
        """Keep an upload under a cleaned name that is free; returns its path under the root.

        Raises:
            TellError: the format is unknown, it is too large, or it cannot be written. Nothing is kept then.
        """
        cleaned = clean_name(name)
        make_folder(self.uploads)
        path, n, size = self.uploads / cleaned, 1, 0
        while not _reserved(path):
            path, n = self.uploads / f"{n}-{cleaned}", n + 1
        try:
            with atomic_path(path) as temporary, temporary.open("wb") as out:
                async for part in parts:
                    if (size := size + len(part)) > MOST_UPLOAD:
                        what = f"is larger than {MOST_UPLOAD >> 20} MB"
                        raise TellError(what, where=cleaned, remedy="Copy it here yourself and name its path.")
                    out.write(part)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path.relative_to(self.path).as_posix()


def is_run(path: Path) -> bool:
    """Whether a folder holds a run."""
    return (path / "run.yaml").is_file() and (path / "status.json").is_file()


def clean_name(name: str) -> str:
    """The name of an upload: letters, digits, ``._-`` and no path.

    Raises:
        TellError: its format is none that is read.
    """
    name = unicodedata.normalize("NFC", unquote(name)).replace("\\", "/").rpartition("/")[2]
    if (known := format_of(name)) is None:
        raise TellError("has a format that is not read", where=brief(name), remedy=f"The formats are {FORMATS_TEXT}.")
    suffix = "".join(known)
    stem = re.sub(r"[^\w-]+", "-", name[: -len(suffix)]).strip("-")[:LONGEST_NAME] or "data"
    return stem + suffix


def _reserved(path: Path) -> bool:
    """Make an empty file where there is none, so that two uploads of one name keep apart."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError as error:
        raise unwritable(path, error, "Free disk space.") from error
    return True
