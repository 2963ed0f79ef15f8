"""SIGKILL at any moment is harmless: the same command ends with the same table."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import tell
from studies.studies import numbers
from tell.studies.study_folder import StudyFolder

MOMENTS = 5
CODE = "import torch; torch.set_num_threads(1); import sys, tell; tell.run_study(sys.argv[1], root=sys.argv[2])"


def test_killed_at_random_moments(recipe, home, tmp_path):
    path, root = recipe(), tmp_path / "killed"
    whole = tell.run_study(path, root=tmp_path / "whole")
    random.seed(time.time_ns())
    kills: list[int] = []
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(path), str(root)],
            env={**os.environ, "TELL_HOME": str(home)},
            stderr=subprocess.DEVNULL,
        )
        if len(kills) < MOMENTS:
            kills.append(random.randint(1, 25))
            kill_at_change(process, root, kills[-1])
        code = process.wait(timeout=900)
        if code == 0:
            break
        assert code == -signal.SIGKILL, kills
    assert len(kills) == MOMENTS
    folder = StudyFolder(root / "small")
    assert numbers(folder, root) == numbers(whole, tmp_path / "whole"), kills
    assert (root / "small/table.csv").read_text().count("\n") == (whole.root / "table.csv").read_text().count("\n")
    assert not list((root / "cells").rglob("*.safetensors"))


def kill_at_change(process: subprocess.Popen, folder: Path, number: int) -> None:
    """Send SIGKILL as soon as so many files below a folder were seen to be new or changed."""
    before, seen = files(folder), 0
    while process.poll() is None:
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
