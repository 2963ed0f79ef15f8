"""`tell demo`: the whole method on a built-in task with built-in general data; only the model is downloaded."""

from __future__ import annotations

from pathlib import Path

import tell
from tell.config import Config, load_config
from tell.errors import TellError
from tell.folder import RunFolder
from tell.progress import Display
from tell.run.tune import tune

MINUTES = 11.0  # predictions are right within some 10 %, and a slow machine has 12
OUT = Path("runs/demo")
# Small enough for five minutes on two cores with bf16; real runs use more general rows.
GENERAL_TOKENS = 1.4e4
REPEAT = 4


def example_folder(name: str = "support") -> Path:
    """The folder of an example task: in the installed package, or in the source tree.

    Raises:
        TellError: this installation lacks it.
    """
    package = Path(tell.__file__).parent
    for folder in (package / "examples" / name, package.parents[1] / "examples" / name):
        if folder.is_dir():
            return folder
    raise TellError(f"the example {name!r} is not installed", remedy="Install tell-llm again.")


def demo_config(out: str | Path | None = None, minutes: float | None = None) -> Config:
    """The demo's configuration: support mails to JSON, mixed with the built-in general rows."""
    folder = example_folder()
    return load_config(
        flags={
            "task": {
                "data": str(folder / "train.jsonl"),
                "test": str(folder / "test.jsonl"),
                "schema": str(folder / "schema.json"),
            },
            "anchor": {"text": f"@{folder / 'anchor.txt'}"},
            "general": {"source": "builtin", "tokens": GENERAL_TOKENS},
            "mix": {"repeat": REPEAT},
            "eval": {
                "arms": ["base", "icl", "sft-matched", "sft-readout", "tell-free", "tell"],
                "icl_examples": 4,
                "forgetting_rows": 16,
                "forgetting_answers": 4,
            },
            "out": str(out or OUT),
            "max_minutes": MINUTES if minutes is None else minutes,
        }
    )


def demo(
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    minutes: float | None = None,
) -> RunFolder:
    """Run the demo and return its run folder.

    Args:
        out: run folder; default ``runs/demo``.
        resume: continue an interrupted demo there.
        overwrite: replace an earlier demo there.
        minutes: shrink the run until it is predicted to fit, as with ``--max-minutes``.

    Returns:
        The run folder with the report.
    """
    return tune(demo_config(out, minutes), resume=resume, overwrite=overwrite, display=display, command="tell demo")
