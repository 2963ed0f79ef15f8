"""An environment for each peer, so that no pin of theirs touches ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.drive import say
from tell.errors import TellError
from tell.home import make_folder, tell_home

PACKAGES = {"trl": ["trl>=1.16", "peft"], "llamafactory": ["llamafactory"], "swift": ["ms-swift"]}
UNWANTED = {"llamafactory": ["torchaudio", "torchvision"]}  # come built for another torch; text needs neither
OWN = frozenset({"transformers"})  # runs in ours


def environment(peer: str) -> str | None:
    """Interpreter of a peer's environment under ``$TELL_HOME/bench``, made at the first call; None for our own.

    Raises:
        TellError: pip could not install it; the last line of pip is in the message.
    """
    if peer in OWN:
        return None
    folder = make_folder(tell_home() / "bench") / peer
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ready = folder / "ready.json"
    if ready.exists() and python.exists():
        return str(python)
    say(f"{peer}: installing into {folder} (once)")
    _call([sys.executable, "-m", "venv", "--clear", str(folder)], peer)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Our very build of torch, so that no engine gets other kernels; its public version where that build is not found.
    try:
        _call([*install, f"torch=={torch.__version__}"], peer)
    except TellError:
        _call([*install, f"torch=={torch.__version__.split('+')[0]}"], peer)
    _call([*install, *PACKAGES[peer]], peer)
    if peer in UNWANTED:
        _call([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[peer]], peer)
    ready.write_text(json.dumps(PACKAGES[peer]), encoding="utf-8")
    return str(python)


def _call(command: list[str], peer: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise TellError(
            f"cannot be installed ({lines[-1].strip() if lines else f'exit {done.returncode}'})",
            where=peer,
            remedy=f"Leave it out with --peers, or make {Path(command[0]).parent.parent} by hand.",
        )
