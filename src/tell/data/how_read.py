"""How a file was read, for whoever shows it."""

from __future__ import annotations

from tell.data.file_read import FileRead
from tell.data.sources import Loaded


def how_read(loaded: Loaded) -> dict[str, object]:
    """How a file was read, for whoever shows it (`tell look`).

    Returns:
        ``flags`` (what to type to read it so; empty where the column names suffice), ``guessed``, ``names`` (of all
        columns), ``sheet``, ``sheets`` and ``encoding`` (None where there is none), ``notices`` and ``left_out``
        (origin and reason of each row). Path, layout and columns are in findings.json too
        (`tell.run.task_rows.describe`).
    """
    file = loaded.file or FileRead()
    return {
        "flags": loaded.flags,
        "guessed": loaded.guessed,
        "names": list(loaded.names),
        "sheet": file.sheet,
        "sheets": list(file.sheets),
        "encoding": file.encoding,
        "notices": list(loaded.notices),
        "left_out": [{"origin": origin, "reason": reason} for origin, reason in loaded.dropped],
    }
