"""SIGKILL at any moment is harmless: the same command ends with the same table."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
from studies.studies import numbers
from tell.studies.study_folder import StudyFolder

MOMENTS = 5


def test_killed_at_random_moments(recipe, whole, tmp_path):
    path, root = recipe(), tmp_path / "killed"
    random.seed(time.time_ns())
    kills: list[int] = []
    while True:
        with open(tmp_path / "shown.txt", "w", encoding="utf-8") as shown:
            process = forked.start(("study", str(path), "--root", str(root)), os.environ, stdout=shown, stderr=shown)
        if len(kills) < MOMENTS:
            kills.append(random.randint(1, 25))
            kill_at_change(process, root, kills[-1])
        process.join(forked.PATIENCE)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (kills, (tmp_path / "shown.txt").read_text())
    assert len(kills) == MOMENTS
    folder = StudyFolder(root / "small")
    assert numbers(folder, root) == numbers(whole, whole.root.parent), kills
    assert (root / "small/table.csv").read_text().count("\n") == (whole.root / "table.csv").read_text().count("\n")
    assert not list((root / "cells").rglob("*.safetensors"))


def kill_at_change(process: BaseProcess, folder: Path, number: int) -> None:
    """Send SIGKILL as soon as so many files below a folder were seen to be new or changed."""
    before, seen = files(folder), 0
    while process.exitcode is None:
        now = files(folder)
        seen += len(now - before)
        before = now
        if seen >= number:
            process.kill()
            return
        time.sleep(0.002)


def files(folder: Path) -> set[tuple[str, int]]:
    """Path and time of change of every file, as far as they stay where they are while we look."""
    found = set()
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            try:
                found.add((path, os.stat(path).st_mtime_ns))
            except FileNotFoundError:
                continue
    return found
