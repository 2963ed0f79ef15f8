"""The folder that a dataset is written to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tell.errors import TellError


@dataclass(frozen=True)
class Replace:
    """A folder to write, replacing any dataset in it."""

    folder: str | Path


Destination = str | Path | Replace


def writable_folder(out: Destination, parts: Sequence[str] = ("",)) -> Path:
    """The folder to write.

    Args:
        parts: folders in it that each hold a dataset.

    Raises:
        TellError: it is a file, or has a dataset that must not be replaced.
    """
    folder = Path(out.folder if isinstance(out, Replace) else out)
    if folder.exists() and not folder.is_dir():
        raise TellError("is a file, not a folder", where=str(folder), remedy="Name another folder with --out.")
    for held in (folder / part for part in parts):
        if (held / "train.jsonl").exists() and not isinstance(out, Replace):
            remedy = "Name another folder, or add --overwrite."
            raise TellError("already has a dataset", where=str(held), remedy=remedy)
    return folder
