"""Rows that the model writes, kept by blocks in a file for each engine, model and settings.

Rows are written in blocks with a seed each, so a larger amount extends a smaller one. A run takes the first blocks that
suffice, however many the file holds, so what it draws from does not depend on other runs. Engines round otherwise and
draw other random numbers, so each has a file of its own, and a run notes whose rows it has: resumed, it reads those.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from tell.errors import TellError
from tell.files import read_jsonl, write_json, write_jsonl
from tell.folder import RunFolder
from tell.home import make_folder

if TYPE_CHECKING:
    from tell.run.session import Session

Enough = Callable[[Sequence[dict]], float]
Block = Callable[[int, Counter[str], Callable[[float], None]], list[dict]]

BLOCK = 128
MOST_EMPTY_BLOCKS = 4
USUAL_ROW = {"instruction": "word " * 20, "output": "word " * 60}  # to estimate the yield of a first block


class Written(BaseModel):
    """``written.json`` of a run: the engine that wrote its general rows, and its prompts without answers."""

    general: str | None = None
    prompts: str | None = None


def written_by_engine(folder: RunFolder, rows: Literal["general", "prompts"]) -> str | None:
    """The engine that wrote a run's rows in an earlier session; None: none has yet."""
    found: str | None = getattr(_written(folder), rows)
    return found


def keep_engine(folder: RunFolder, rows: Literal["general", "prompts"], engine: str) -> None:
    """Note which engine wrote rows of a run."""
    known = _written(folder).model_copy(update={rows: engine})
    write_json(folder.written, known.model_dump(exclude_none=True))


def _written(folder: RunFolder) -> Written:
    return folder.read_as(folder.written, Written) if folder.written.exists() else Written()


def cached_blocks(path: Path, enough: Enough) -> Path | None:
    """The rows a run would take from the file of all, if enough were written before."""
    rows, blocks = _read(path)
    taken = _first_blocks(rows, blocks, enough)
    return None if taken is None else _part(path, rows, blocks[:taken])


def _read(path: Path) -> tuple[list[dict], list[dict]]:
    """All rows, and the numbers that each block kept and rejected."""
    facts = path.with_suffix(".json")
    if not path.exists() or not facts.exists():
        return [], []
    rows, blocks = read_jsonl(path), json.loads(facts.read_text(encoding="utf-8"))["blocks"]
    written = sum(block["rows"] for block in blocks)
    return (rows[:written], blocks) if len(rows) >= written else ([], [])


def _first_blocks(rows: list[dict], blocks: list[dict], enough: Enough) -> int | None:
    """The number of blocks that suffice; None where all together do not."""
    end = 0
    for number, block in enumerate(blocks, start=1):
        end += block["rows"]
        if end and enough(rows[:end]) >= 1:
            return number
    return None


def _part(path: Path, rows: list[dict], blocks: list[dict]) -> Path:
    """A separate file with the rows of the first blocks."""
    end = sum(block["rows"] for block in blocks)
    part = path.with_name(f"{path.stem}-{end}.jsonl")
    if not part.exists() or read_jsonl(part) != rows[:end]:
        write_jsonl(part, rows[:end])
    return part


def write_blocks(
    session: Session,
    file: Callable[[str], Path],
    enough: Enough,
    *,
    block: Block,
    title: str,
    most: int | None = None,
    engine: str | None = None,
) -> tuple[Path, dict]:
    """Write rows into a cached file, block by block, until there are enough; those that are there are reused.

    Args:
        file: of all rows that an engine wrote with this model and these settings.
        enough: share of what is needed that a list of rows makes up, 1 or more when it suffices.
        block: writes one block by its number; counts reasons for rejected rows; reports the share that is done.
        title: of the progress bar.
        most: blocks after which there are as many rows as there will be; None: until there are enough.
        engine: as of `tell.run.self_written.write_self_data`.

    Returns:
        The file of the rows to use, and ``{"asked", "kept", "thrown": {reason: rows}, "engine"}`` of their blocks.

    Raises:
        TellError: the model writes nothing usable, and ``most`` is None; or rows of another engine are lost.
    """
    found = None
    while found is None:  # once more where another engine takes over meanwhile: it has a file of its own
        name = engine or session.engine.name
        with _locked(path := file(name), session):  # two runs would write the same blocks, and one over the other
            rows, blocks = _read(path)
            taken = _first_blocks(rows, blocks, enough)
            if taken is None and (most is None or len(blocks) < most):
                if name != session.engine.name:
                    raise _lost(path, name, session.engine.name)
                if not _write_more(session, path, (rows, blocks), enough, block, title, most):
                    continue
            if taken is None:
                taken = len(blocks) if most is None else min(most, len(blocks))
            found = blocks[:taken]
            part = _part(path, rows, found)
    thrown = sum((Counter(block["thrown"]) for block in found), Counter())
    facts = {"asked": len(found) * BLOCK, "kept": sum(b["rows"] for b in found), "thrown": dict(thrown)}
    return part, {**facts, "engine": name}


def _lost(path: Path, engine: str, now: str) -> TellError:
    return TellError(
        f"too few rows that the engine {engine} wrote are left for the run to go on with; {now} would write others",
        where=str(path),
        remedy=f"Resume with --set generate.engine={engine}, or start again with --overwrite.",
    )


@contextmanager
def _locked(path: Path, session: Session) -> Iterator[None]:
    """Hold the lock of a file of rows; while another run holds it, poll the session for a stop."""
    from filelock import FileLock, Timeout

    lock = FileLock(make_folder(path.parent) / f".{path.stem}.lock")  # released by the system if its holder dies
    try:
        lock.acquire(timeout=0)
    except Timeout:
        session.display.note("another run is writing this general data; waiting for it")
        with session.display.bar("wait for another run", None, "s") as advance:
            while not lock.is_locked:
                with suppress(Timeout):
                    lock.acquire(timeout=1)
                advance(0)
                session.check()
    try:
        yield
    finally:
        lock.release()


def _write_more(
    session: Session,
    path: Path,
    found: tuple[list[dict], list[dict]],
    enough: Enough,
    block: Block,
    title: str,
    most: int | None,
) -> bool:
    """Extend the found rows and blocks, in place and on disk, until there are enough; False: another engine took over.

    The block that it took over in is not kept: some of its rows, or of what they answer, are of the one before.
    """
    (rows, blocks), engine = found, session.engine.name
    seen = {row["instruction"].strip().lower() for row in rows}
    empty = 0
    share = max(0.0, min(1.0, enough(rows)))
    gain = enough([USUAL_ROW] * BLOCK)
    with session.display.bar(title, 100, "%") as advance:
        shown = 0.0

        def show(target: float) -> None:
            nonlocal shown
            step = max(0.0, min(1.0, target) - shown)
            shown += step
            advance(step * 100, f"{len(rows)} rows")
            session.check()

        def moved(part: float) -> None:
            show(share + part * gain)

        show(share)
        while True:
            before, thrown = len(rows), Counter[str]()
            pairs = block(len(blocks), thrown, moved)
            if session.engine.name != engine:
                return False
            for pair in pairs:
                name = pair["instruction"].strip().lower()
                if name in seen:
                    thrown["duplicate"] += 1
                    continue
                seen.add(name)
                rows.append(pair)
            blocks.append({"rows": len(rows) - before, "thrown": dict(thrown)})
            write_jsonl(path, rows)
            write_json(path.with_suffix(".json"), {"blocks": blocks})
            empty = empty + 1 if len(rows) == before else 0
            if most is None and empty >= MOST_EMPTY_BLOCKS:
                raise TellError(
                    f"the model wrote no usable row in {empty * BLOCK} tries ({dict(thrown)})",
                    where="general.source self",
                    remedy="Pass a file of general instruction data with --general.",
                )
            new = max(0.0, min(1.0, enough(rows)))
            gain, share = max(0.0, new - share), new
            show(share)
            if (share >= 1 and rows) or (most is not None and len(blocks) >= most):
                return True
