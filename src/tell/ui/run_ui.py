"""`tell ui`: one page server for a root; a second one says where the first is."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from filelock import FileLock, Timeout

from tell.errors import TellError, Unwritable
from tell.files import read_facts, write_json
from tell.home import make_folder, remove_older, remove_unfinished
from tell.progress import Display
from tell.serve.listen import bind
from tell.ui.ui_app import make_ui
from tell.ui.ui_root import FULL, UiRoot

HOST = "127.0.0.1"
GRACE, STARTING, KEPT = 2, 30, 7 * 86_400  # seconds: requests at a stop, a server until it says its address, answers


def run_ui(path: str | Path, display: Display, *, port: int) -> None:
    """Serve the page of a root until a signal; where one is served already, say its address and return.

    Raises:
        TellError: the root is no folder or cannot be written, or the port is in use.
    """
    root = UiRoot(path)
    if not root.path.is_dir():
        raise TellError("is not a folder", where=str(path), remedy="Name the folder that has, or is to have, the runs.")
    file = root.state / "address.json"
    try:
        make_folder(root.state).chmod(0o700)
        with FileLock(root.state / ".lock", timeout=0), bind(HOST, port) as listening:
            remove_unfinished(root.uploads)
            remove_older(root.state / "questions", KEPT)
            token = str(read_facts(file).get("token") or secrets.token_urlsafe(24))  # kept, for open tabs
            write_json(file, {"token": token})  # without the last address, which may no longer be ours
            address = f"http://{HOST}:{listening.getsockname()[1]}/?token={token}"
            options: dict[str, Any] = {"log_level": "error", "access_log": False, "server_header": False, "ws": "none"}
            server = uvicorn.Config(make_ui(root, token), lifespan="off", timeout_graceful_shutdown=GRACE, **options)
            listening.listen()  # before the address is known: whoever opens it at once waits
            write_json(file, {"address": address, "token": token})
            display.note(f"page for {root.path}: {address} (Ctrl-C stops the page, not its runs)")
            with suppress(KeyboardInterrupt):
                uvicorn.Server(server).run(sockets=[listening])
    except (Unwritable, OSError) as error:
        if not isinstance(error, Timeout):
            what = f"cannot be written ({error.strerror or error})" if isinstance(error, OSError) else error.what
            raise TellError(what, where=str(root.path), remedy=FULL) from error
        end = time.monotonic() + STARTING
        while not (said := read_facts(file).get("address")) and time.monotonic() < end:
            time.sleep(0.1)  # it is starting
        display.note(f"a page for {root.path} is open at {said or 'an address that it has not said yet'}")
