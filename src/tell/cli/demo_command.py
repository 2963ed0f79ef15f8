"""``tell demo``: the main job on a task of ours, with nothing to prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tell.cli.common import number, read_number
from tell.cli.tune_command import ask_about


def demo(
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="run folder")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    minutes: Annotated[str | None, typer.Option("--minutes", metavar="N", help="end within this time")] = None,
) -> None:
    """Tune SmolLM2-135M on an example task, in about five minutes.

    The task is ours: support mails to JSON. Nothing needs to be prepared or downloaded but the model.
    """
    limit = read_number("--minutes", minutes, number)
    import tell
    from tell.cli.display import make_console, make_display
    from tell.cli.tables import show_run
    from tell.verbs.demo import OUT

    if not (resume or overwrite):
        resume, overwrite = ask_about(out or OUT)
    run = tell.demo(out=out, resume=resume, overwrite=overwrite, display=make_display(), minutes=limit)
    show_run(make_console(), run)
