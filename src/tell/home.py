"""The cache folder of converted models and measured speeds: ``$TELL_HOME``, else ``~/.cache/tell``."""

from __future__ import annotations

import os
from pathlib import Path

from tell.errors import TellError
from tell.files import expanded
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
