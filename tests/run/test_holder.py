"""Whether a process works on a run, and stopping the one that does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
from filelock import FileLock

from tell.folder import RunFolder
from tell.run.claim import is_held, stop_holder

HOLD = (
    "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_process_that_holds_a_run_gets_the_signal(folder, holder):
    assert is_held(folder) and stop_holder(folder)
    assert holder.wait(30) == -signal.SIGTERM
    assert not is_held(folder) and not stop_holder(folder)


def test_nobody_who_only_has_the_file_open_is_stopped(folder):
    folder.lock.touch()
    code = "import sys; file = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder.lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "open\n"
    assert not stop_holder(folder) and other.poll() is None
    other.communicate()
    assert other.returncode == 0


def test_neither_this_process_nor_another_users_is_stopped(folder, holder, monkeypatch):
    uids = psutil.Process(holder.pid).uids()
    monkeypatch.setattr(psutil.Process, "uids", lambda self: uids._replace(real=os.getuid() + 1))
    assert not stop_holder(folder) and holder.poll() is None
    monkeypatch.undo()
    holder.communicate()
    with FileLock(folder.lock):
        assert is_held(folder) and not stop_holder(folder)


def test_a_folder_without_a_lock_is_held_by_nobody(folder):
    assert not is_held(folder) and not stop_holder(folder) and not folder.lock.exists()
