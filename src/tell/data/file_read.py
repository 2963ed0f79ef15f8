"""How a file was read: what was found in it, beyond its records."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FileRead:
    """Filled while the records of a file are read; done once the last one is.

    Attributes:
        encoding: of a text file; None for a binary one.
        sheet: the sheet of a workbook that is read, and ``sheets`` all of its sheets that hold cells to read.
        notices: guesses and losses, as sentences for the user.
    """

    encoding: str | None = None
    sheet: str | None = None
    sheets: tuple[str, ...] = ()
    notices: list[str] = field(default_factory=list)
