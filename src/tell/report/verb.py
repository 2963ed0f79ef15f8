"""``tell.report`` and ``tell report``: write the page of one run, or one page for several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tell.errors import TellError
from tell.report.compare import compare
from tell.report.page import render
from tell.run import RunFolder, write_text


def report(runs: str | Path | RunFolder | Sequence[str | Path | RunFolder], *, out: str | Path | None = None) -> Path:
    """Write the report of a run again, or one page that sets several side by side.

    Args:
        runs: a run folder, or several.
        out: the page to write. Default: ``report.html`` in the run folder; for several runs ``compare.html``
            beside the first of them.

    Returns:
        The page's path.

    Raises:
        TellError: a folder does not exist or holds no run, or the page cannot be written.
    """
    given = [runs] if isinstance(runs, str | Path | RunFolder) else list(runs)
    folders = [r if isinstance(r, RunFolder) else RunFolder(r) for r in given]
    if not folders:
        raise TellError("no run given", where="tell report", remedy="Give one run folder or more.")
    for folder in folders:
        if folder.root.is_dir() and not any(p.exists() for p in (folder.config, folder.status, folder.metrics)):
            raise TellError(
                "holds no run (no run.yaml, status.json or metrics.json)",
                where=str(folder.root),
                remedy="Give a folder made by tell tune.",
            )
    if len(folders) == 1:
        path = Path(out) if out else folders[0].report
        write_text(path, render(folders[0]))
    else:
        path = Path(out) if out else folders[0].root.resolve().parent / "compare.html"
        write_text(path, compare(folders))
    return path
