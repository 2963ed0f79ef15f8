"""`tell ui`: one page server for a root; a second one says where the first is."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

import uvicorn
from filelock import FileLock, Timeout

from tell.errors import TellError
from tell.files import read_json, write_json
from tell.home import make_folder
from tell.progress import Display
from tell.serve.listen import bind
from tell.ui.ui_app import make_ui
from tell.ui.ui_root import UiRoot

HOST = "127.0.0.1"
GRACE = 2  # seconds that open requests have when the server is stopped


def run_ui(path: str | Path, display: Display, *, port: int) -> None:
    """Serve the page of a root until a signal; where one is served already, say its address and return.

    Raises:
        TellError: the root is no folder or cannot be written, or the port is in use.
    """
    root = UiRoot(path)
    if not root.path.is_dir():
        raise TellError("is not a folder", where=str(path), remedy="Name the folder that has, or is to have, the runs.")
    make_folder(root.state).chmod(0o700)
    kept = root.state / "address.json"
    lock = FileLock(root.state / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        display.note(f"a page for {root.path} is open at {_kept(kept, 'address')}")
        return
    try:
        token = _kept(kept, "token") or secrets.token_urlsafe(24)  # kept, so that open tabs outlive a restart
        with bind(HOST, port) as listening:
            address = f"http://{HOST}:{listening.getsockname()[1]}/?token={token}"
            write_json(kept, {"address": address, "token": token})
            display.note(f"page for {root.path}: {address} (Ctrl-C stops the page, not its runs)")
            config = uvicorn.Config(
                make_ui(root, token),
                log_level="error",
                access_log=False,
                lifespan="off",
                server_header=False,
                ws="none",
                limit_concurrency=256,
                timeout_graceful_shutdown=GRACE,
            )
            with suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listening])
    finally:
        lock.release()


def _kept(path: Path, key: str) -> str:
    """``address`` or ``token`` of the last page of the root; empty where there is none."""
    try:
        value = read_json(path, remedy="").get(key)
    except (FileNotFoundError, TellError):
        return ""
    return value if isinstance(value, str) else ""
