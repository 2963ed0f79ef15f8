"""The command `tell` as a process of its own, forked from one that has imported its libraries once.

A new interpreter takes 6 CPU seconds to import torch and transformers. That `python -m tell` itself works is tested in
test_core_install.py, test_processes.py and tests/cli/test_help.py.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from typing import IO

LIBRARIES = ["peft", "tell.cli.main", "tell.models.load", "tell.run.tune", "tell.train.trainer"]  # no work is done yet
PATIENCE = 300  # seconds until a test gives up; nothing is timed


def start(
    argv: tuple[str, ...],
    env: Mapping[str, str],
    *,
    stdin: IO | None = None,
    stdout: IO,
    stderr: IO,
    module: str = "tell",
) -> BaseProcess:
    """`python -m MODULE ARGV` in this folder, reading and writing these files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with open(os.devnull, encoding="utf-8") as nothing:
        numbers = [stream.fileno() for stream in (stdin or nothing, stdout, stderr)]
        process = context.Process(target=_child, args=(module, argv, dict(env), _Streams(numbers)))
        process.start()
    return process


def run(*argv: str, env: Mapping[str, str], input: str | None = None) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, "-m", "tell", *argv], capture_output=True, text=True)`."""
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        asked.write((input or "").encode())
        asked.seek(0)
        process = start(argv, env, stdin=asked, stdout=out, stderr=err)
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
        texts = [_whole(file) for file in (out, err)]
    assert process.exitcode is not None, texts
    return subprocess.CompletedProcess(("tell", *argv), process.exitcode, *texts)


def _whole(file: IO[bytes]) -> str:
    file.seek(0)
    return io.TextIOWrapper(io.BytesIO(file.read()), encoding="utf-8").read()


class _Streams:
    """File descriptors that travel with the arguments of a process."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __getstate__(self) -> list:
        return [reduction.DupFd(number) for number in self.numbers]

    def __setstate__(self, sent: list) -> None:
        self.numbers = [item.detach() for item in sent]


def _child(module: str, argv: tuple[str, ...], env: dict[str, str], streams: _Streams) -> None:
    for number, sent in enumerate(streams.numbers):
        os.dup2(sent, number)
        os.close(sent)
    sys.stdin, sys.stdout = open(0, encoding="utf-8", closefd=False), open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)  # tiny matrices
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
