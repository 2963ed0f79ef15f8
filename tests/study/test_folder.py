"""Claiming a run folder: nothing that no run made is ever removed."""

from __future__ import annotations

import pytest

import tell
from study.runs import config_of
from tell.errors import TellError
from tell.study.folder import claim, default_out, open_folder, read_run_config


@pytest.fixture
def run(tiny_model, tmp_path):
    """(configuration, folder of a run that was begun)."""
    config = config_of(tiny_model("llama"), tmp_path / "run")
    folder, resumed = claim(config, resume=False, overwrite=False)
    assert not resumed and not folder.root.exists()
    open_folder(folder, fresh=True, config=config)
    return config, folder


def test_a_run_that_exists(run):
    config, folder = run
    with pytest.raises(TellError, match=r"exists already \(state: running\).*--resume.*--overwrite"):
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
    open_folder(folder, fresh=True, config=config)
    assert sorted(path.name for path in folder.root.iterdir()) == ["notes.md", "run.yaml", "status.json"]


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


def test_paths_are_made_absolute_and_names_left_alone(tmp_path, monkeypatch):
    from tell.config import load_config
    from tell.study.folder import with_full_paths

    monkeypatch.chdir(tmp_path)
    for name in ("t.jsonl", "a.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    given = {"task": {"data": "t.jsonl"}, "anchor": {"text": "@a.txt"}, "model": {"name": "org/model"}}
    full = with_full_paths(load_config(flags=given))
    assert full.task.data == str(tmp_path / "t.jsonl")
    assert full.anchor.text == f"@{tmp_path / 'a.txt'}"
    assert (full.model.name, full.general.source) == ("org/model", "self")
    text = load_config(flags={"anchor": {"text": "t.jsonl"}})  # without the @ it is the anchor itself
    assert with_full_paths(text).anchor.text == "t.jsonl"
