"""A root folder and a client of its page."""

from __future__ import annotations

import json

import psutil
import pytest
from starlette.testclient import TestClient

from tell.ui import jobs
from tell.ui.ui_root import UiRoot
from ui.asking import TOKEN, stranger
from ui.ui_server import SOURCE, until


@pytest.fixture
def root(tmp_path, monkeypatch) -> UiRoot:
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    (tmp_path / "root").mkdir()
    return UiRoot(tmp_path / "root")


@pytest.fixture
def client(root) -> TestClient:
    made = stranger(root)
    assert made.get("/", params={"token": TOKEN}).status_code == 200
    return made


@pytest.fixture
def stand_in(root, monkeypatch):
    """A command in place of `tell`: notes that it was called, says something, and ends when `go` is there.

    Signals that are named in `deaf` do not end it.
    """
    script = root.path.parent / "stand-in"
    script.write_text(
        '#!/bin/sh\ntrap "" $(cat ../deaf)\necho "$@" >> ../calls\necho "reading: 3 of 9" >&2\n'
        "while [ ! -e ../go ]; do sleep 0.02; done\ncat ../answer\ncat ../said >&2\n"
    )
    script.chmod(0o755)
    for name in ("answer", "said", "calls", "deaf"):
        (root.path.parent / name).write_text("")
    monkeypatch.setattr(jobs.sys, "executable", str(script))
    yield root.path.parent
    (root.path.parent / "go").touch()
    for file in root.state.glob("*/*.json"):
        until(lambda file=file: not psutil.pid_exists(json.loads(file.read_text())["pid"]))
