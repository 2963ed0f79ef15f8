"""Packs a study's finished cells into one file, ``cells.jsonl.gz``, to archive and share without run folders.

    python -m tell.studies.packed studies/fig11

writes ``studies/fig11/cells.jsonl.gz``. Each line is a cell: ``{"cell": NAME, "metrics.json": {...},
"predictions/tell.jsonl": [...], ...}``, the files that tables and figures are made from; configurations, logs,
adapters and pictures of hidden states are left out. The same cells give the same bytes. `tell study` takes cells from
the file in the study's folder instead of running them, where nothing is asked for that the file leaves out.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from tell.errors import TellError, first_line
from tell.files import MOST_JSON, atomic_folder, atomic_path, read_json, read_jsonl, unwritable, write_json, write_jsonl
from tell.progress import Display
from tell.shown import one_line
from tell.studies.study_folder import StudyFolder

if TYPE_CHECKING:
    from tell.studies.open_study import Study

FILES = ("status.json", "metrics.json", "plan.json", "findings.json")
CELL = re.compile(r"[\w+-]+-[0-9a-f]{16}")
AGAIN = "Remove the cell's folder and run the study again, or restore the file."
NAME = re.compile(rf"{'|'.join(map(re.escape, FILES))}|predictions/(?:\w[\w+.-]*/){{0,2}}\w[\w+.-]*\.jsonl", re.ASCII)

Files = dict[str, Any]  # name of a file in the cell's folder to its JSON value, or to the rows of a .jsonl file


def pack_cells(folder: str | Path) -> Path:
    """Write the finished cells of a study into one file, and return its path.

    A cell without a run folder, or that is being run again, keeps its line of a file that is already there.

    Returns:
        ``cells.jsonl.gz`` in the study's folder.

    Raises:
        TellError: not a study, a finished cell is neither in its run folder nor packed, or has files that are damaged
            or have names that `read_packed` refuses.
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
        done = {name for name, cell in data["cells"].items() if cell["state"] == "done"}
        for name in sorted(done | (before.keys() & data["cells"].keys())):
            _check_name(name, CELL, study.state)
            there = name in done and (cells / name / "metrics.json").exists()
            files = _read_cell(cells / name) if there else before.get(name)
            if files is None:
                raise TellError(f"has no cell {name}", where=str(cells), remedy="Run the study again to pack it.")
            line = json.dumps({"cell": name, **files}, ensure_ascii=False, separators=(",", ":"))
            out.write(line.encode("utf-8", "backslashreplace") + b"\n")
    return study.packed


def _read_cell(folder: Path) -> Files:
    files = {name: folder / name for name in FILES if (folder / name).exists()}
    found: Files = {name: read_json(path, remedy=AGAIN) for name, path in files.items()}
    for path in sorted((folder / "predictions").rglob("*.jsonl")):
        name = path.relative_to(folder).as_posix()
        _check_name(name, NAME, folder)
        found[name] = read_jsonl(path)
    return found


def _check_name(name: str, pattern: re.Pattern[str], where: Path) -> None:
    """Refuse to write what could not be read again."""
    if not pattern.fullmatch(name):
        remedy = "Move that file away, or give a folder that `tell study` wrote."
        raise TellError(f"{name!r} is not a name of a cell or its files", where=str(where), remedy=remedy)


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
                if not all(isinstance(files[file], list if file.endswith(".jsonl") else dict) for file in files):
                    raise ValueError(f"{name} has a file of another kind than its name says")
                if "metrics.json" not in files:
                    raise ValueError(f"{name} has no metrics.json")
                yield name, files
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = "Delete it to run its cells again, or pack the study again."
        raise TellError(f"is damaged ({first_line(error)})", where=str(path), remedy=remedy) from error


@contextmanager
def _writing(where: Path | str, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(where, error, remedy) from error


def _write_cell(folder: Path, files: Files) -> None:
    status = {**files.get("status.json", {}), "state": "done"}
    with atomic_folder(folder) as temporary:
        for name, content in {**files, "status.json": status}.items():
            (write_jsonl if name.endswith(".jsonl") else write_json)(temporary / name, content)


@contextmanager
def unpacked(path: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """A temporary folder with the requested packed cells; empty where none is packed.

    Raises:
        TellError: the packed file is damaged, or the temporary folder cannot be written.
    """
    remedy = "Free disk space, or set TMPDIR to another folder."
    with ExitStack() as stack:
        with _writing("the folder for temporary files", remedy):
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        for name, files in read_packed(path) if path.exists() else ():
            if wanted(name):
                with _writing(temporary, remedy):
                    _write_cell(temporary / name, files)
        yield temporary


def usable_cells(study: Study, *, keep_adapters: bool, display: Display) -> Iterator[tuple[str, Files]]:
    """Packed cells of a study that are not finished below its root and need not be run.

    Args:
        keep_adapters: adapters are wanted, which no packed cell has.
        display: is told of packed cells that must be run again.

    Raises:
        TellError: the packed file is damaged.
    """
    path, again = study.folder.packed, 0
    cells = {cell.name: cell for cell in study.cells}
    for name, files in read_packed(path) if path.exists() else ():
        if name not in cells or study.root.finished(name):
            continue
        if keep_adapters or cells[name].separate is not None:
            again += 1
        else:
            yield name, files
    if again:
        display.note(f"{again} packed cells are not used: adapters and pictures of hidden states are not packed")


def restore_cells(study: Study, *, keep_adapters: bool, display: Display) -> None:
    """Unpack `usable_cells` below the root, so that they are not run again.

    Raises:
        TellError: the packed file is damaged, or the root cannot be written.
    """
    root = study.root
    for name, files in usable_cells(study, keep_adapters=keep_adapters, display=display):
        with (
            _writing(root.cell(name).root, "Free disk space or choose another folder with --root."),
            suppress(Timeout),  # another process is running it
            root.lock(name).acquire(timeout=0),
        ):
            if not root.finished(name):
                # What it took elsewhere is no measurement of this machine: see `measured_evaluation`.
                root.note(name, state="waiting", error=None, attempts=0, stopped=0, host=None)
                _write_cell(root.cell(name).root, files)


def main(folders: Sequence[str]) -> int:
    """Pack studies; the exit code."""
    try:
        if not folders:
            raise TellError("no folder given", where="tell.studies.packed", remedy="Give the folders of studies.")
        for folder in folders:
            print(pack_cells(folder))
    except TellError as error:
        print("error:", one_line(str(error)), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
