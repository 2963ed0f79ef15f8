"""Packs a study's finished cells into one file, ``cells.jsonl.gz``, to archive and share without run folders.

    python -m tell.studies.packed studies/fig11

writes ``studies/fig11/cells.jsonl.gz``. Each line is a cell: ``{"cell": NAME, "metrics.json": {...},
"predictions/tell.jsonl": [...], ...}``, the files that tables and figures are made from; configurations, logs,
adapters and pictures of hidden states are left out. The same cells give the same bytes. `tell study` takes cells from
the file in the study's folder instead of running them.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from tell.errors import TellError, first_line
from tell.files import MOST_JSON, atomic_folder, atomic_path, read_jsonl, write_json, write_jsonl
from tell.studies.study_folder import Root, StudyFolder

FILES = ("status.json", "metrics.json", "plan.json", "findings.json")
CELL = re.compile(r"[\w+-]+-[0-9a-f]{16}")
NAME = re.compile(rf"{'|'.join(map(re.escape, FILES))}|predictions/(?:\w[\w+.-]*/){{0,2}}\w[\w+.-]*\.jsonl", re.ASCII)

Files = dict[str, Any]  # name of a file in the cell's folder to its JSON value, or to the rows of a .jsonl file


def pack_cells(folder: str | Path) -> Path:
    """Write the finished cells of a study into one file, and return its path.

    A cell without a run folder keeps its line of a file that is already there.

    Returns:
        ``cells.jsonl.gz`` in the study's folder.

    Raises:
        TellError: not a study, or a finished cell is neither in its run folder nor packed.
    """
    study = StudyFolder(folder)
    data = study.read()
    cells = study.root / str(data.get("root", "..")) / "cells"
    before = dict(read_packed(study.packed)) if study.packed.exists() else {}
    with (
        atomic_path(study.packed) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as out,
    ):
        for name in sorted(name for name, cell in data["cells"].items() if cell["state"] == "done"):
            files = _read_cell(cells / name) if (cells / name / "metrics.json").exists() else before.get(name)
            if files is None:
                raise TellError(f"has no cell {name}", where=str(cells), remedy="Run the study again to pack it.")
            line = json.dumps({"cell": name, **files}, ensure_ascii=False, separators=(",", ":"))
            out.write(line.encode("utf-8", "backslashreplace") + b"\n")
    return study.packed


def _read_cell(folder: Path) -> Files:
    files = {name: folder / name for name in FILES if (folder / name).exists()}
    found: Files = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
    rows = sorted((folder / "predictions").rglob("*.jsonl"))
    return found | {path.relative_to(folder).as_posix(): read_jsonl(path) for path in rows}


def read_packed(path: Path) -> Iterator[tuple[str, Files]]:
    """Name and files of each packed cell.

    Raises:
        TellError: the file is damaged, too large, or has names that `pack_cells` does not write.
    """
    try:
        total = 0
        with gzip.open(path) as lines:
            while line := lines.readline(MOST_JSON):
                total += len(line)
                if total > MOST_JSON:
                    raise ValueError(f"more than {MOST_JSON / 1e6:,.0f} MB unpacked")
                files = json.loads(line)
                name = files.pop("cell")
                for text, pattern in ((name, CELL), *((file, NAME) for file in files)):
                    if not pattern.fullmatch(text):
                        raise ValueError(f"{text!r} is not a name of a cell or its files")
                yield name, files
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = "Delete it to run its cells again, or pack the study again."
        raise TellError(f"is damaged ({first_line(error)})", where=str(path), remedy=remedy) from error


def _write_cell(folder: Path, files: Files) -> None:
    with atomic_folder(folder) as temporary:
        for name, content in {"status.json": {"state": "done"}, **files}.items():
            (write_jsonl if name.endswith(".jsonl") else write_json)(temporary / name, content)


@contextmanager
def unpacked(path: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """A temporary folder with the requested packed cells; empty where none is packed."""
    with tempfile.TemporaryDirectory() as temporary:
        for name, files in read_packed(path) if path.exists() else ():
            if wanted(name):
                _write_cell(Path(temporary) / name, files)
        yield Path(temporary)


def restore_cells(study: StudyFolder, root: Root, names: set[str]) -> None:
    """Unpack those of the cells that are not finished below the root, so that they are not run again."""
    for name, files in read_packed(study.packed) if study.packed.exists() else ():
        if name in names and not root.finished(name):
            try:
                with root.lock(name).acquire(timeout=0):
                    if not root.finished(name):
                        _write_cell(root.cell(name).root, files)
            except Timeout:  # another process is running it
                continue


def main(folders: Sequence[str]) -> None:
    for folder in folders:
        print(pack_cells(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
