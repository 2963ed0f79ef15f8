"""``tell ui``: a page in the browser to run TELL from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tell.cli.common import argument, option, port_number, takes_options
from tell.errors import require_package


@dataclass(frozen=True)
class UiOptions:
    root: Path = argument("ROOT", "folder with the runs; default: this one", Path("."))
    port: int = option("--port", "port; 0: any free one", "N", port_number, default=8765)


@takes_options
def ui(options: UiOptions) -> None:
    """Open a page to run TELL from: data, plan, runs, reports, chat.

    It listens at 127.0.0.1 alone. Runs are processes of their own and outlive the page.
    """
    for package in ("starlette", "uvicorn"):
        require_package(package, "serve", where="tell ui")
    from tell.cli.display import make_display
    from tell.ui.run_ui import run_ui

    run_ui(options.root, make_display(), port=options.port)
