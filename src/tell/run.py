"""The run folder: the one place that knows file names. Files are written beside, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tell.errors import TellError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that is renamed to it on success and removed on failure.

    Raises:
        TellError: the disk is full or the folder is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes 0600; a shared run folder must stay readable
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> TellError:
    return TellError(
        f"cannot be written ({error.strerror or error})",
        where=str(path),
        remedy="Free disk space or choose another folder with --out.",
    )


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair, as JSON has it


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


class RunFolder:
    """Paths of one run. Creating the object touches nothing on disk."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    config = property(lambda self: self.root / "run.yaml")
    anchor = property(lambda self: self.root / "anchor.json")
    schema = property(lambda self: self.root / "schema.json")
    split = property(lambda self: self.root / "split.json")
    plan = property(lambda self: self.root / "plan.json")
    manifest = property(lambda self: self.root / "manifest.parquet")
    adapter = property(lambda self: self.root / "adapter")
    metrics = property(lambda self: self.root / "metrics.json")
    findings = property(lambda self: self.root / "findings.json")
    predictions = property(lambda self: self.root / "predictions")
    logs = property(lambda self: self.root / "logs")
    report = property(lambda self: self.root / "report.html")
    status = property(lambda self: self.root / "status.json")
    arms = property(lambda self: self.root / "arms")

    def files(self) -> list[Path]:
        """Every file and folder a run makes at the top of its folder, there or not."""
        return [getattr(self, name) for name, kind in vars(RunFolder).items() if isinstance(kind, property)]

    def prediction(self, arm: str) -> Path:
        """Answers of one arm: ``predictions/<arm>.jsonl``."""
        return self.predictions / f"{arm}.jsonl"

    def general_losses(self, arm: str) -> Path:
        """Losses of an arm's weights on general rows: ``predictions/general/<arm>.jsonl``."""
        return self.predictions / "general" / f"{arm}.jsonl"

    def losses(self, arm: str) -> Path:
        """Per-step training log of one arm: ``logs/<arm>.jsonl``."""
        return self.logs / f"{arm}.jsonl"

    def set_status(self, state: str, **more: Any) -> None:
        """``running``, ``interrupted``, ``failed`` or ``done``, with what else is worth knowing."""
        write_json(self.status, {"state": state, **more})

    def read_status(self) -> dict:
        if not self.status.exists():
            return {}
        return json.loads(self.status.read_text(encoding="utf-8"))

    def require(self, path: Path, verb: str) -> Path:
        """``path`` if it exists, else the error that says which verb makes it."""
        if not path.exists():
            raise TellError(
                f"has no {path.relative_to(self.root)}",
                where=str(self.root),
                remedy=f"Give the folder of a finished run, or make one with {verb}.",
            )
        return path
