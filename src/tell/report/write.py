"""``tell.write_report`` and ``tell report``: write the page of one run, or one page for several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tell.errors import TellError
from tell.files import write_text
from tell.folder import RunFolder, reading
from tell.report.compare import compare
from tell.report.page import GENERATOR, render


def write_report(
    runs: str | Path | RunFolder | Sequence[str | Path | RunFolder], *, out: str | Path | None = None
) -> Path:
    """Write the report of a run again, or one page with several side by side, and return its path.

    Args:
        runs: a run folder, or several.
        out: the page to write. Default: ``report.html`` in the run folder; for several runs ``compare.html``
            next to the first of them.

    Returns:
        The page's path.

    Raises:
        TellError: a folder does not exist, has no run or has damaged files; the page cannot be
            written, or would replace a file that is not a report.
    """
    given = [runs] if isinstance(runs, str | Path | RunFolder) else list(runs)
    folders = [r if isinstance(r, RunFolder) else RunFolder(r) for r in given]
    if not folders:
        raise TellError("no run given", where="tell report", remedy="Pass one run folder or more.")
    for folder in folders:
        if folder.root.is_dir() and not any(p.exists() for p in (folder.config, folder.status, folder.metrics)):
            raise TellError(
                "has no run (no run.yaml, status.json or metrics.json)",
                where=str(folder.root),
                remedy="Name a folder made by tell tune.",
            )
    one = len(folders) == 1
    default = folders[0].report if one else folders[0].root.resolve().parent / "compare.html"
    path = Path(out) if out else default
    check_replaceable(path, "-o")
    with reading(folders[0].root):
        page = render(folders[0]) if one else compare(folders)
    write_text(path, page)
    return path


def check_replaceable(path: Path, flag: str) -> None:
    """Refuse to write a page over a file that is not one.

    Args:
        flag: names the file.

    Raises:
        TellError: there is such a file.
    """
    if path.exists() and not _is_ours(path):
        raise TellError(
            "already exists and is not a report by tell, so it is left as it is",
            where=str(path),
            remedy=f"Name another file with {flag}, or move it away.",
        )


def _is_ours(path: Path) -> bool:
    """Whether a file is a page that a report may replace."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return GENERATOR.encode() in head or b"TELL report</title>" in head  # the title: of earlier versions
