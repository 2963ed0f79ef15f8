"""Clients of the page, for tests."""

from __future__ import annotations

from pathlib import Path

from starlette.testclient import TestClient

from tell.ui.ui_app import make_ui
from tell.ui.ui_root import UiRoot
from ui.ui_server import until

TOKEN, BASE = "s3cret-token", "http://127.0.0.1:8765"
ORIGIN, HTMX = {"origin": BASE}, {"hx-request": "true"}


def stranger(root: UiRoot, **more: bool) -> TestClient:
    """A client that has no token yet."""
    return TestClient(make_ui(root, TOKEN), base_url=BASE, **more)


def friend(root: UiRoot, **more: bool) -> TestClient:
    """A client of a page server of its own, as after a restart."""
    made = stranger(root, **more)
    assert made.get("/static/ui.js").status_code == 401
    made.cookies.set("tell-ui-8765", TOKEN)
    return made


def told(client, path, chosen):
    """The part that a question ends with."""
    return until(
        lambda: (text := client.get(path, params=chosen, headers=HTMX).text) and "every 1s" not in text and text
    )


def calls(folder: Path) -> list[str]:
    """The commands that the stand-in was started as."""
    return (folder / "calls").read_text().splitlines()
