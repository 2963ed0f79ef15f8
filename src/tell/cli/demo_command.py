"""``tell demo``: the whole method on an example task, without preparation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tell.cli.common import number, option, switch, takes_options
from tell.cli.tune_command import ask_about


@dataclass(frozen=True)
class DemoOptions:
    out: Path | None = option("--out", "run folder", "DIR")
    resume: bool = switch("--resume", "Resume an interrupted run.")
    overwrite: bool = switch("--overwrite", "Replace an earlier run.")
    minutes: float | None = option("--minutes --max-minutes", "finish within N minutes", "N", number)


@takes_options
def demo(options: DemoOptions) -> None:
    """Tune SmolLM2-135M on an example task, in about five minutes.

    The task turns support mails into JSON. Nothing to prepare: only the model is downloaded.
    """
    import tell
    from tell.cli.display import make_console, make_display
    from tell.cli.tables import show_run
    from tell.verbs.demo import OUT

    resume, overwrite = options.resume, options.overwrite
    if not (resume or overwrite):
        resume, overwrite = ask_about(options.out or OUT)
    run = tell.demo(
        out=options.out, resume=resume, overwrite=overwrite, display=make_display(), minutes=options.minutes
    )
    show_run(make_console(), run)
