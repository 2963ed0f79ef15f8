"""The first test rows of a run with their answers, also while an arm answers. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tell.files import first_rows, read_facts
from tell.folder import RunFolder
from tell.names import ARMS, arm_order
from tell.run.growing import SHOWN
from tell.shown import one_line


def label_of(arm: str) -> str:
    """The name of an arm to show, which may be anybody's text."""
    return ARMS[arm].label if arm in ARMS else one_line(arm)


def arms_in(folder: Path) -> list[str]:
    """The arms that have a file in a folder, in the order of the tables."""
    return arm_order({path.stem: path for path in folder.glob("*.jsonl")}) if folder.is_dir() else []


def first_answers(folder: RunFolder, *, growing: bool = False) -> list[dict[str, Any]]:
    """The first test rows, with the answers of all arms that have answered and, if wanted, of the one that does now."""
    found = [(a, row, False) for a in arms_in(folder.predictions) for row in first_rows(folder.prediction(a), SHOWN)]
    now = read_facts(folder.answering) if growing else {}
    shown = now["rows"] if isinstance(now.get("rows"), list) else []
    found += [(str(now.get("arm")), row, True) for row in shown if isinstance(row, dict)]
    rows: dict[str, dict[str, Any]] = {}
    for arm, row, grows in found:
        text = {part: str(row.get(part) or "") for part in ("prompt", "reference", "answer")}
        if (key := str(row.get("hash"))) in rows or len(rows) < SHOWN:
            known = rows.setdefault(key, {**text, "answers": []})
            known["answers"].append((label_of(arm), text["answer"], grows))
    return list(rows.values())
