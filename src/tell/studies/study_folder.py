"""Files of studies: a root with the cells and data sets that its studies share, and a folder for each study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock

from tell.errors import TellError
from tell.files import expanded, read_json, write_json
from tell.folder import RunFolder
from tell.home import make_folder

FACTS: dict[str, type] = {"state": str, "error": str, "host": str, "evaluation": str, "trace": str}
NUMBERS: dict[str, type] = {"seconds": float, "training_seconds": float, "attempts": int, "stopped": int}


def needs(what: str) -> TellError:
    """The error for a missing package of the extra ``study``."""
    return TellError(what, where="tell study", remedy='Install it: pip install "tell-llm[study]".')


class Root:
    """The folder whose cells and data sets studies share. Creating the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)

    cells = property(lambda self: self.path / "cells")
    data = property(lambda self: self.path / "data")

    def cell(self, name: str) -> RunFolder:
        """A cell's run folder."""
        return RunFolder(self.cells / name)

    def lock(self, name: str, kind: str = "cells") -> FileLock:
        """The lock of a cell or data set; the system releases it when its holder dies."""
        return FileLock(make_folder(self.path / kind / ".locks") / f"{name}.lock")

    def record(self, name: str) -> dict[str, Any]:
        """The record of a cell next to its folder: state, error, seconds, host, attempts; empty if there is none.

        ``stopped``: how many of the attempts were given back.
        """
        try:
            found = read_json(self.cells / f"{name}.json", remedy="")
        except (FileNotFoundError, TellError):
            return {}
        return {key: value for key, value in found.items() if _valid(key, value)}

    def note(self, name: str, **facts: object) -> dict[str, Any]:
        """Update a cell's record; only the holder of its lock may."""
        record = {**self.record(name), **facts}
        write_json(self.cells / f"{name}.json", record)
        return record

    def finished(self, name: str) -> bool:
        """Whether a cell has all its numbers."""
        folder = self.cell(name)
        return folder.metrics.exists() and folder.read_status().get("state") == "done"


def _valid(key: str, value: Any) -> bool:
    """Whether `Root.note` writes such a value; others count as missing."""
    if key in NUMBERS:
        return type(value) in (int, NUMBERS[key]) and 0 <= value < 1e15
    return value is None or isinstance(value, FACTS.get(key, object))


class StudyFolder:
    """Paths of one study, and its state."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    recipe = property(lambda self: self.root / "recipe.yaml")
    state = property(lambda self: self.root / "study.json")
    page = property(lambda self: self.root / "index.html")
    packed = property(lambda self: self.root / "cells.jsonl.gz")

    def read(self) -> dict[str, Any]:
        """``study.json``.

        Raises:
            TellError: it is missing or damaged.
        """
        remedy = "Name the folder that `tell study` wrote, or run it again into another."
        try:
            data = read_json(self.state, remedy=remedy)
        except FileNotFoundError as error:
            raise TellError("has no study", where=str(self.root), remedy=remedy) from error
        for key, kind in (("cells", dict), ("rows", list), ("recipe", dict)):
            if not isinstance(data.get(key, kind()), kind):
                raise TellError(f"is damaged ({key} is not a {kind.__name__})", where=str(self.state), remedy=remedy)
        return data

    def failed(self) -> dict[str, str]:
        """The error of each failed cell, by name."""
        return {name: str(cell["error"]) for name, cell in self.read()["cells"].items() if cell["state"] == "failed"}
