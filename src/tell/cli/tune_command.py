"""``tell tune``: from a file of examples to an adapter, scores and a report."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tell.cli.common import Given, configured_by_run, switch, takes_options
from tell.errors import TellError
from tell.shown import one_line
from tell.train.launch import launched


@dataclass(frozen=True)
class TuneOptions:
    resume: bool = switch("--resume", "Resume an interrupted run.", panel="Run")
    overwrite: bool = switch("--overwrite", "Replace an earlier run.", panel="Run")


@takes_options
def tune(given: Given, options: TuneOptions) -> None:
    """Tune a model on DATA, score it, write a report.

    The tuned model is compared with the untuned one and with plain fine-tuning on the same test rows.

    Example: tell tune tickets.jsonl --model smollm2-135m --out runs/tickets
    """
    resume, overwrite = options.resume, options.overwrite
    if resume and overwrite:
        raise TellError("both are given", where="--resume and --overwrite", remedy="Give one of them.")
    config = (_as_before(given) if resume else given).load("tune")
    launch = launched()
    leads = launch is None or launch.rank == 0
    if leads and config.out and not (resume or overwrite):
        resume, overwrite = ask_about(Path(config.out))

    import tell
    from tell.cli.display import make_console, make_display
    from tell.cli.tables import show_run

    run = tell.tune(config, resume=resume, overwrite=overwrite, display=make_display(), command=command_line())
    if leads:
        show_run(make_console(), run)


def _as_before(given: Given) -> Given:
    """``tell tune --resume --out DIR`` takes its configuration from the folder's run.yaml."""
    from tell.folder import RunFolder

    out = given.flags.get("--out")
    if isinstance(out, str) and given.data is None and given.file is None and RunFolder(out).config.exists():
        return configured_by_run(given, Path(out), scores=True)
    return given


def ask_about(folder: Path) -> tuple[bool, bool]:
    """(resume, overwrite) for a run folder that exists, asked on a terminal; elsewhere `tell.tune` refuses it."""
    filled = folder.is_dir() and any(folder.iterdir())
    if not filled or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False, False
    print(f"{one_line(str(folder))} exists: [r]esume, [o]verwrite or [c]ancel? ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline().strip().lower()
    if answer not in ("r", "resume", "o", "overwrite"):
        raise TellError("cancelled; nothing was changed", where=str(folder), remedy="Choose another folder with --out.")
    return answer.startswith("r"), answer.startswith("o")


def command_line() -> str:
    """The command line as typed, for the report."""
    return " ".join(["tell", *map(shlex.quote, sys.argv[1:])])
