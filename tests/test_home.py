"""Folders that TELL keeps things in."""

from __future__ import annotations

import os

from tell.home import remove_older


def test_only_old_files_are_removed(tmp_path):
    remove_older(tmp_path / "none", 10)
    old, new = tmp_path / "old", tmp_path / "new"
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    remove_older(tmp_path, 1000)
    assert list(tmp_path.iterdir()) == [new]
