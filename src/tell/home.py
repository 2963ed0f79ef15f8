"""Folders that TELL keeps things in; the cache, ``$TELL_HOME``, else ``~/.cache/tell``, has models and speeds."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from tell.errors import TellError
from tell.files import clean_temporary, expanded, stamp
from tell.files import unwritable as cannot_be_written


def tell_home() -> Path:
    """The cache folder; not created here."""
    return expanded(os.environ.get("TELL_HOME") or "~/.cache/tell")


def make_folder(path: Path) -> Path:
    """Create ``path`` with its parents.

    Raises:
        TellError: it cannot be created or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    if not os.access(path, os.W_OK):
        raise unwritable(path, PermissionError(13, "Permission denied"))
    return path


def unwritable(path: Path, error: OSError) -> TellError:
    """The error for a cache folder that cannot be written."""
    return cannot_be_written(path, error, "Free disk space, or set TELL_HOME to a writable folder.")


def remove_older(folder: Path, seconds: float) -> None:
    """Remove the files of a folder that nobody has written to for ``seconds``; there may be no such folder."""
    for path in folder.glob("*"):
        if stamp(path)[0] < time.time() - seconds:
            path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what writers of a folder left that were killed: temporary files and empty ones, which held a name."""
    clean_temporary(folder.glob(".*.tmp"))
    for path in folder.glob("[!.]*"):
        with suppress(OSError):
            if path.is_file() and not path.stat().st_size:
                path.unlink()
