"""Kernels that cannot be had are a reason in words, never a crash: each case in a process of its own."""

from __future__ import annotations

import importlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

lib = importlib.import_module("tell.kernels.library")  # the package has a function of that name
ASK = "from tell.kernels import library, reason; print(library() is None, reason())"


def ask(home: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("CC", "TELL_KERNELS")}
    variables = {**inherited, "TELL_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", ASK], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def executable(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are built on Linux only")
def test_compilers_that_do_not_work(tmp_path):
    no_program = executable(tmp_path / "empty", "\x7fELF nothing behind it")
    assert ask(tmp_path / "a", CC=no_program).startswith(f"True {no_program} cannot be run")
    failing = executable(tmp_path / "failing", "#!/bin/sh\necho no backend >&2\nexit 1\n")
    assert ask(tmp_path / "b", CC=failing) == "True failing failed: no backend"
    lying = executable(tmp_path / "lying", '#!/bin/sh\nfor a; do [ "$o" = -o ] && echo text > "$a"; o=$a; done\n')
    assert ask(tmp_path / "c", CC=lying).startswith("True cannot be loaded")


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are built on Linux only")
def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    answer = ask(tmp_path / "file")
    assert (answer.startswith("True") and "cannot be written" in answer) or "no C compiler" in answer


def test_switch(tmp_path):
    assert ask(tmp_path, TELL_KERNELS="off") == "True switched off by $TELL_KERNELS"


def test_runtimes_in_folders_with_spaces(tmp_path, monkeypatch):
    maps = (
        "7f00-7f01 r--p 00000000 08:01 12    /home/A B/site-packages/torch/lib/libgomp-a3.so.1\n"
        "7f02-7f03 r--p 00000000 08:01 13    /usr/lib/scikit_learn.libs/libgomp.so.1\n"
        "7f04-7f05 rw-p 00000000 00:00 0 \n"
    )
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: maps)
    assert lib._runtimes() == {"/home/A B/site-packages/torch/lib/libgomp-a3.so.1"}

    def missing(*_, **__):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "read_text", missing)
    with pytest.raises(lib.Unavailable, match="/proc/self/maps"):
        lib._runtimes()


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a compiler")
def test_a_library_that_is_cut_short_is_made_again(tmp_path, monkeypatch):
    """Loaded, it would end the process by a signal."""
    monkeypatch.setenv("TELL_HOME", str(tmp_path))
    made: list[int] = []

    def compile_(command):
        if "-o" in command:
            made.append(1)
            Path(command[command.index("-o") + 1]).write_bytes(b"a whole library")
        return subprocess.CompletedProcess(command, 0, "a compiler", "")

    monkeypatch.setattr(lib, "_run", compile_)
    path = lib._build()
    assert lib._build() == path and len(made) == 1
    path.write_bytes(b"a whole")
    assert lib._build() == path and len(made) == 2 and path.read_bytes() == b"a whole library"
    path.with_suffix(".sha256").unlink()
    assert lib._build() == path and len(made) == 3
