"""A root folder and a client of its page."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from tell.ui.ui_root import UiRoot
from ui.asking import TOKEN, stranger
from ui.ui_server import SOURCE


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
