"""Claiming a run folder: nothing that no run made is ever removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import tell
from run.runs import config_of
from tell.errors import TellError
from tell.files import temporary_prefix, write_json
from tell.folder import RunFolder
from tell.run.claim import claim, default_out, open_folder, read_run_config


@pytest.fixture
def run(tiny_model, tmp_path):
    """(configuration, folder of a run that was begun)."""
    config = config_of(tiny_model("llama"), tmp_path / "run")
    folder, resumed = claim(config, resume=False, overwrite=False)
    assert not resumed and not folder.root.exists()
    with open_folder(folder, fresh=True, config=config):
        pass
    return config, folder


def test_a_run_that_exists(run):
    config, folder = run
    with pytest.raises(TellError, match=r"already exists \(state: running\).*--resume.*--overwrite"):
        claim(config, resume=False, overwrite=False)
    assert claim(config, resume=True, overwrite=False)[1] is True
    assert claim(config, resume=False, overwrite=True)[1] is False
    with pytest.raises(TellError, match="both"):
        claim(config, resume=True, overwrite=True)
    assert folder.config.exists()


@pytest.mark.parametrize(
    ("key", "section", "value"),
    [
        ("seed", None, 8),
        ("mix.repeat", "mix", 3),
        ("train.learning_rate", "train", 0.1),
        ("general.rows", "general", 9),
    ],
)
def test_resuming_with_other_settings_names_the_key(run, key, section, value):
    config, _ = run
    name = key.rsplit(".", 1)[-1]
    if section:
        other = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    else:
        other = config.model_copy(update={name: value})
    with pytest.raises(TellError) as error:
        claim(other, resume=True, overwrite=False)
    assert key in str(error.value) and repr(value) in str(error.value) and "--overwrite" in str(error.value)


def test_nothing_to_resume(tiny_model, tmp_path):
    config = config_of(tiny_model("llama"), tmp_path / "run")
    for make in (lambda: None, lambda: (tmp_path / "run").mkdir()):
        make()
        with pytest.raises(TellError, match="no run to resume"):
            claim(config, resume=True, overwrite=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(TellError, match="is a file"):
        claim(config.model_copy(update={"out": str(tmp_path / "file")}), resume=False, overwrite=False)


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}, {}])
@pytest.mark.parametrize("name", ["thesis.txt", "run.yaml"])
def test_other_files_are_left_as_they_are(tiny_model, tmp_path, how, name):
    """Also where somebody keeps a configuration of their own, named run.yaml, among their files."""
    place = tmp_path / "home"
    (place / "logs").mkdir(parents=True)
    (place / name).write_text("dear")
    with pytest.raises(TellError, match="left as it is"):
        tell.tune(config_of(tiny_model("llama"), place), **how)
    assert sorted(path.name for path in place.iterdir()) == sorted(["logs", name])


def test_overwriting_removes_the_run_and_nothing_else(run):
    config, folder = run
    for path in (folder.metrics, folder.prediction("tell"), folder.adapter / "checkpoint/facts.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (folder.root / "notes.md").write_text("mine")
    with open_folder(folder, fresh=True, config=config, overwrite=True):
        pass
    assert names(folder) == ["notes.md", "run.yaml", "status.json"]


def names(folder) -> list[str]:
    """What lies in a folder, but for the lock, which stays, and temporary files of this process, which lives."""
    return sorted(path.name for path in folder.root.iterdir() if path != folder.lock and path.suffix != ".tmp")


class Killed(BaseException):
    """The process ends here: nobody catches it."""


def killed_at(monkeypatch, event: int) -> None:
    """Let the process die before its n-th change on the disk."""
    left = [event]

    def dying(change):
        def before(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return change(*args, **kwargs)

        return before

    for owner, name in (
        (os, "replace"),
        (os, "fsync"),
        (tempfile, "mkdtemp"),
        (tempfile, "mkstemp"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    for name in ("touch", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))


OLD = "the old run's"


@pytest.mark.parametrize("begun", [True, False], ids=["overwritten", "fresh"])
@pytest.mark.parametrize("how", ["resume", "overwrite", "again"])
def test_a_start_that_is_killed_anywhere_can_be_repeated(tiny_model, tmp_path, monkeypatch, begun, how):
    ends = set()
    for event in range(60):
        config = config_of(tiny_model("llama"), tmp_path / str(event))
        folder = RunFolder(tmp_path / str(event))
        if begun:
            with open_folder(folder, fresh=True, config=config):
                pass
            folder.arms.mkdir()
            folder.metrics.write_text(OLD)
            (folder.root / "notes.md").write_text("mine")
        with monkeypatch.context() as patch:
            killed_at(patch, event)
            try:
                with open_folder(folder, fresh=True, config=config, overwrite=begun):
                    pass
                ends.add("whole")
            except Killed:
                ends.add("killed")
        began = folder.status.exists()
        if how == "resume" and not (folder.root.is_dir() and any(folder.root.iterdir())):
            continue  # not even begun
        if how == "again" and began:
            with pytest.raises(TellError, match="already exists"):
                claim(config, resume=False, overwrite=False)
            continue
        _, resumed = claim(config, resume=how == "resume", overwrite=how == "overwrite")
        assert resumed == (how == "resume" and began)
        with open_folder(folder, fresh=not resumed, config=config, overwrite=how == "overwrite"):
            assert folder.read_status()["state"] == "running"
        kept = ["arms", "metrics.json"] if resumed and folder.arms.exists() else []
        kept += ["notes.md"] if begun else []
        assert names(folder) == sorted([*kept, "run.yaml", "status.json"]), event
    assert ends == {"whole", "killed"}


def test_a_start_that_cannot_be_written_leaves_all_as_it_was(run, monkeypatch):
    config, folder = run
    folder.metrics.write_text(OLD)
    before = {path.name: path.read_bytes() for path in folder.root.iterdir()}

    def full(*_, **__):
        raise TellError("cannot be written (No space left on device)")

    monkeypatch.setattr(type(folder), "set_status", full)
    with (
        pytest.raises(TellError, match="No space left"),
        open_folder(folder, fresh=True, config=config, overwrite=True),
    ):
        pass
    assert {path.name: path.read_bytes() for path in folder.root.iterdir()} == before
    new = RunFolder(folder.root.with_name("new"))
    with pytest.raises(TellError, match="No space left"), open_folder(new, fresh=True, config=config):
        pass
    assert not new.root.exists()


def test_an_old_run_that_cannot_be_moved_stays_whole(run, monkeypatch):
    config, folder = run
    for path in (folder.metrics, folder.anchor):
        path.write_text(OLD)
    before = {path.name: path.read_bytes() for path in folder.root.iterdir()}
    for last in range(4):
        moved = []

        def stuck(source, target, moved=moved, last=last, real=os.replace):
            if RunFolder.ASIDE in str(target):
                moved.append(source)
                if len(moved) > last:
                    raise PermissionError(13, "Permission denied")
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stuck)
            with pytest.raises(TellError, match="Permission denied"):
                open_folder(folder, fresh=True, config=config, overwrite=True).__enter__()
        assert {path.name: path.read_bytes() for path in folder.root.iterdir()} == before


def test_files_that_came_since_the_folder_was_looked_at_are_left(tiny_model, tmp_path):
    config = config_of(tiny_model("llama"), tmp_path / "run")
    folder, _ = claim(config, resume=False, overwrite=False)
    folder.root.mkdir()
    folder.config.write_text("mine")
    with pytest.raises(TellError, match="left as it is"):
        open_folder(folder, fresh=True, config=config).__enter__()
    assert [path.read_text() for path in folder.root.iterdir()] == ["mine"]


HOLD = """
import sys, time
from pathlib import Path
from tell.config import load_config
from tell.folder import RunFolder
from tell.run.claim import open_folder
folder = RunFolder(sys.argv[1])
with open_folder(folder, fresh=True, config=load_config(folder.config), overwrite=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(run):
    """Others are refused in one line as long as it lives, readers are not, and death frees the folder."""
    config, folder = run
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"held\n"
        before = names(folder)
        for how in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            with pytest.raises(TellError, match="another process is working on this run"):
                claim(config, **how)
        with pytest.raises(TellError, match="another process"), open_folder(folder, fresh=False, config=config):
            pass
        assert read_run_config(folder).seed == config.seed and folder.read_status()["state"] == "running"
        assert names(folder) == before
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    assert claim(config, resume=True, overwrite=False)[1]


def test_temporary_files_of_dead_processes_are_removed(run):
    config, folder = run
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder.predictions.mkdir()
    alive = [f"{temporary_prefix(path)}abc.tmp" for path in (folder.metrics, folder.prediction("tell"))]
    elsewhere = f".metrics.json.{'0' * 12}.{dead.pid}-abc.tmp"  # of a machine whose processes nobody here knows
    for number in (dead.pid, os.getpid()):
        for path in (folder.metrics, folder.prediction("tell")):
            path.with_name(f"{temporary_prefix(path, number)}abc.tmp").write_text("half")
    (folder.root / elsewhere).write_text("half")
    (folder.root / ".notes.tmp").write_text("mine")
    with open_folder(folder, fresh=False, config=config):
        pass
    left = sorted(path.name for path in folder.root.rglob(".*.tmp"))
    assert left == sorted([*alive, elsewhere, ".notes.tmp"])
    (folder.root / f"{temporary_prefix(folder.plan, dead.pid)}x.tmp").write_text("half")
    theirs = folder.root / f".plan.json.{'0' * 12}.{dead.pid}-x.tmp"
    theirs.write_text("half")
    write_json(folder.plan, {})  # whoever writes a file again removes what was left of it
    assert list(folder.root.glob(".plan*")) == [theirs]


def test_files_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle, real=os.fsync: (done.append("fsync"), real(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b, real=os.replace: (done.append("rename"), real(a, b)))
    write_json(tmp_path / "x.json", {})
    assert done == ["fsync", "rename", "fsync"]


def test_what_a_run_makes_is_declared(finished):
    """Nothing else is removed when it is overwritten."""
    folder, _ = finished
    made = {path.name for path in folder.root.iterdir()} - {folder.lock.name}
    assert made <= {path.name for path in folder.made}
    assert all(path.parent == folder.root for path in folder.made)


def test_overwritten_run_is_a_new_one(tiny_model, tmp_path):
    model = tiny_model("llama")
    tell.tune(config_of(model, tmp_path / "run", eval={"arms": ["base", "sft"]}))
    folder = tell.tune(config_of(model, tmp_path / "run", eval={"arms": ["base"]}), overwrite=True)
    assert not folder.arms.exists() and {p.stem for p in folder.predictions.rglob("*.jsonl")} == {"base"}


def test_default_folder_counts_on(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(tiny_model("llama"), None)
    assert str(default_out(config)) == "runs/train-1"
    (tmp_path / "runs/train-1").mkdir(parents=True)
    assert str(default_out(config)) == "runs/train-2"


def test_run_config_that_cannot_be_read(tmp_path, run):
    _, folder = run
    with pytest.raises(TellError, match="no such run folder"):
        read_run_config(type(folder)(tmp_path / "nowhere"))
    folder.config.write_text("seed: [")
    with pytest.raises(TellError, match="not valid YAML"):
        read_run_config(folder)
    folder.config.write_text("# nothing\n")
    with pytest.raises(TellError, match="is empty"):  # not the defaults, which are another run
        read_run_config(folder)


def test_paths_are_made_absolute_and_names_left_alone(tmp_path, monkeypatch):
    from tell.config import load_config
    from tell.run.claim import with_full_paths

    monkeypatch.chdir(tmp_path)
    for name in ("t.jsonl", "a.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    given = {"task": {"data": "t.jsonl"}, "anchor": {"text": "@a.txt"}, "model": {"name": "org/model"}}
    full = with_full_paths(load_config(flags=given))
    assert full.task.data == str(tmp_path / "t.jsonl")
    assert full.anchor.text == f"@{tmp_path / 'a.txt'}"
    assert (full.model.name, full.general.source) == ("org/model", "auto")
    text = load_config(flags={"anchor": {"text": "t.jsonl"}})  # without the @ it is the anchor itself
    assert with_full_paths(text).anchor.text == "t.jsonl"
