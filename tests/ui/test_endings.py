"""Processes that end: how a page waits for them and what it says of them; what a killed page left behind."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import pytest

from tell import child_process
from tell.errors import TellError, Unwritable
from tell.files import temporary_prefix
from tell.home import remove_unfinished
from tell.ui import run_ui, ui_root
from tell.ui.chat_relay import serve_run, served, serving
from tell.ui.jobs import Job
from tell.ui.run_view import state_of, tuning
from tell.ui.ui_root import FULL, NotHere
from ui.asking import ORIGIN, calls
from ui.made_runs import make_run
from ui.ui_server import until


def meanwhile(monkeypatch, act) -> None:
    """Do something whenever the page waits for a process."""
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: (act(), time.sleep(seconds)))
    monkeypatch.setattr(child_process, "time", clock)


def kill(job: Job) -> None:
    job.process().kill()
    until(lambda: job.process() is None)


def test_a_run_is_resumed_while_its_process_ends(client, root, stand_in, monkeypatch):
    folder, job = make_run(root, "runs/a", state="running"), tuning(root, "runs/a")
    job.start(["tune", "t.csv"])
    folder.set_status("interrupted")
    os.utime(folder.status, (time.time() + 9,) * 2)
    text = client.get("/run/runs/a").text
    assert state_of(root, "runs/a") == "running" and "every 1s" in text and "Resume</button>" not in text
    meanwhile(monkeypatch, (stand_in / "go").touch)
    client.post("/resume/runs/a", headers=ORIGIN)
    assert job.command == ["tell", "tune", "--resume", "--out=runs/a"]


def test_a_run_that_does_not_end_is_not_killed(client, root, stand_in, monkeypatch):
    folder, job = make_run(root, "runs/a", state="interrupted"), tuning(root, "runs/a")
    job.start(["tune", "t.csv"])
    os.utime(folder.status, (time.time() + 9,) * 2)
    monkeypatch.setattr(child_process, "STOPPING", 0.0)
    assert "has not ended yet" in client.post("/resume/runs/a", headers=ORIGIN).text
    assert job.process() is not None and job.command == ["tell", "tune", "t.csv"]


def test_a_run_that_is_resumed_at_once_is_starting(client, root, stand_in, monkeypatch):
    folder, job = make_run(root, "runs/a", state="interrupted"), tuning(root, "runs/a")
    client.post("/resume/runs/a", headers=ORIGIN)
    started = job.record()["started"]
    os.utime(folder.status, (started - 0.001,) * 2)  # the start that the system tells is up to a second early
    assert state_of(root, "runs/a") == "starting" and "every 1s" in client.get("/run/runs/a").text
    meanwhile(monkeypatch, lambda: pytest.fail("waited for the process that was just started"))
    client.post("/resume/runs/a", headers=ORIGIN)  # a second click
    assert job.record()["started"] == started


def test_a_freed_model_is_loaded_again_once_it_is_gone(client, root, stand_in, monkeypatch):
    make_run(root, "runs/a")
    (stand_in / "deaf").write_text("TERM")
    client.post("/load/runs/a", headers=ORIGIN)
    until(lambda: calls(stand_in))
    other = threading.Thread(target=serve_run, args=(root, "runs/a"))

    def click() -> None:
        if other.ident is None:
            other.start()
        (stand_in / "go").touch()

    meanwhile(monkeypatch, click)
    client.post("/unload/runs/a", headers=ORIGIN)
    other.join()
    until(lambda: len(calls(stand_in)) == 2)
    assert serving(root).command[1:3] == ["serve", "runs/a"]


def test_a_model_that_does_not_go_is_killed(client, root, stand_in, monkeypatch):
    make_run(root, "runs/a")
    (stand_in / "deaf").write_text("TERM")
    client.post("/load/runs/a", headers=ORIGIN)
    until(lambda: calls(stand_in))
    monkeypatch.setattr(child_process, "STOPPING", 0.0)
    text = client.post("/unload/runs/a", headers=ORIGIN).text
    assert serving(root).process() is None and "Load the model" in text and 'role="alert"' not in text


def test_what_was_killed_is_said(client, root, stand_in):
    make_run(root, "runs/a")
    last = "it ended; its last line: reading: 3 of 9"
    client.post("/export/runs/a?target=hf", headers=ORIGIN)
    client.post("/load/runs/a", headers=ORIGIN)
    name = client.post("/start", params={"data": "t.csv"}, headers=ORIGIN).url.path.removeprefix("/run/")
    for job in (Job(root, "export hf runs/a"), serving(root), tuning(root, name)):
        until(lambda job=job: job.lines())
        kill(job)
    text = client.get("/ship/runs/a").text
    assert "failed</span>" in text and last in text and "Export and check" in text
    assert last in client.get("/chat/runs/a").text and last in client.get(f"/run/{name}").text
    (root.path / "exports/runs/a-hf").mkdir(parents=True)
    assert "failed</span>" not in client.get("/ship/runs/a").text
    tuning(root, name).file(".log").write_text("")
    assert "it ended without a word" in client.get(f"/run/{name}").text


def test_the_address_of_a_model_outlives_a_long_log(root, stand_in):
    serve_run(root, "runs/a")
    until(lambda: serving(root).lines())
    address = "http://127.0.0.1:1/v1"
    serving(root).file(".log").write_text(f"serving at {address} (Ctrl-C)\n" + "a warning\n" * 9000)
    assert served(root) == ("runs/a", address)


def test_a_run_that_has_just_been_removed_is_not_here(root, monkeypatch):
    make_run(root, "runs/a")

    def gone(_path: object) -> list[str]:
        raise FileNotFoundError(2, "No such file")

    monkeypatch.setattr(ui_root, "os", SimpleNamespace(listdir=gone))
    with pytest.raises(NotHere):
        root.run("runs/a")


def test_what_a_killed_upload_left_is_removed(root):
    root.uploads.mkdir()
    kept = root.uploads / "a.csv"
    kept.write_text("x")
    for name in ("claimed.csv", f"{temporary_prefix(kept, 2**22 + 1)}x.tmp"):  # no process has so high a number
        (root.uploads / name).touch()
    remove_unfinished(root.uploads)
    assert list(root.uploads.iterdir()) == [kept]


@pytest.mark.parametrize("error", [Unwritable("cannot be written (no space)"), OSError(30, "Read-only file system")])
def test_a_root_that_cannot_be_written_is_told_in_its_own_words(root, monkeypatch, error):
    monkeypatch.setattr(run_ui, "make_folder", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(TellError, match="cannot be written") as found:
        run_ui.run_ui(root.path, None, port=0)
    assert found.value.remedy == FULL and "--out" not in str(found.value)
