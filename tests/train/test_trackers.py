"""Trackers: the numbers of each step arrive, and a tracker that fails costs no training."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest

from tell.config import make_config
from tell.config_sections import TrainConfig
from tell.errors import TellError
from tell.train import trackers
from tell.train.step_log import StepLog, StepReport
from tell.train.trackers import TRACKERS, Reported, TrackerKind, Trackers, missing_trackers

LOSSES = (3.0, 2.5, 2.25)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of their own, without login or server."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "HOME": tmp_path,
        "NETRC": tmp_path / "netrc",
        "WANDB_CACHE_DIR": tmp_path / "cache",
        "WANDB_CONFIG_DIR": tmp_path / "config",
        "TRACKIO_DIR": tmp_path / "trackio",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(place: Path, *names: str, note=None) -> list[dict]:
    """Three steps reported as a training loop reports them; the lines of its log."""
    path, said = place / "run" / "logs" / "tell.jsonl", []
    log = StepLog(path, TrainConfig(report_to=names), keep=0, note=note or said.append)
    for step, loss in enumerate(LOSSES, 1):
        log.write(StepReport(step, 3, loss, {"task": loss}, 10, 10 * step, 0.1), 1e-3, 0.5)
    log.close()
    assert note or not said
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_mlflow_has_every_step_and_the_settings(place, monkeypatch):
    import mlflow

    mlflow.set_tracking_uri(f"file://{place}/mlruns")
    try:
        assert len(train(place, "mlflow")) == 3
        (experiment,) = [e for e in mlflow.search_experiments() if e.name == "tell"]
        (run,) = mlflow.MlflowClient().search_runs([experiment.experiment_id])
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss/task")
        assert [(point.step, point.value) for point in history] == list(enumerate(LOSSES, 1))
        assert run.info.run_name == "run/tell" and run.data.params["lora_r"] == "8" and run.info.status == "FINISHED"
    finally:
        mlflow.set_tracking_uri(None)


def test_trackio_has_every_step(place, monkeypatch, capsys):
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", place / "trackio", raising=False)
    train(place, "trackio")
    found = [path for path in place.rglob("tell.db")]
    assert found and not capsys.readouterr().out  # stdout is for results
    with sqlite3.connect(found[0]) as data:
        rows = data.execute("select metrics from metrics where run_name = 'run/tell' order by step").fetchall()
    losses = [metrics["loss/all"] for (text,) in rows if "loss/all" in (metrics := json.loads(text))]
    assert losses == list(LOSSES)


def test_wandb_goes_on_offline_without_a_login_and_says_so(place):
    notes: list[str] = []
    assert len(train(place, "wandb", note=notes.append)) == 3
    (note,) = notes
    assert "no login" in note and "wandb sync" in note
    (run,) = (place / "run" / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    assert run.stat().st_size > 0


def test_wandb_goes_on_offline_with_a_bad_key(place, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(trackers, "WANDB_PATIENCE", 2.0)
    notes: list[str] = []
    train(place, "wandb", note=notes.append)
    assert len(notes) == 1 and "wandb sync" in notes[0]
    assert list((place / "run" / "logs" / "wandb").glob("offline-run-*"))


def test_an_mlflow_server_that_is_gone_is_turned_off(place, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    notes: list[str] = []
    try:
        assert len(train(place, "mlflow", note=notes.append)) == 3
    finally:
        mlflow.set_tracking_uri(None)
    assert len(notes) == 1 and notes[0].startswith("mlflow is turned off and the training goes on")


@pytest.mark.parametrize("fails", ["start", "log", "finish"])
def test_a_tracker_that_raises_is_turned_off_once(place, monkeypatch, fails):
    logged: list[int] = []

    def make(run: Reported):
        if fails == "start":
            raise ConnectionError("gone\nfor good")

        def log(values: dict, step: int) -> None:
            if fails == "log" and step == 2:
                raise ConnectionError("gone\nfor good")
            logged.append(step)

        def finish() -> None:
            raise ConnectionError("gone\nfor good")

        return SimpleNamespace(log=log, finish=finish, store_init_configuration=lambda values: None)

    monkeypatch.setitem(TRACKERS, "tensorboard", TrackerKind(make))
    notes: list[str] = []
    assert [row["step"] for row in train(place, "tensorboard", note=notes.append)] == [1, 2, 3]
    assert notes == ["tensorboard is turned off and the training goes on: ConnectionError: gone"]
    assert logged == {"start": [], "log": [1], "finish": [1, 2, 3]}[fails]


def test_a_tracker_that_is_not_installed_is_said_with_the_command(place, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    (said,) = missing_trackers(["wandb"])
    assert 'pip install "tell-llm[wandb]"' in said
    notes: list[str] = []
    assert not Trackers(["wandb"], Reported(place / "logs" / "x.jsonl", 0, notes.append), {}).open and not notes


def test_none_is_asked_of_nothing(place):
    assert len(train(place)) == 3
    assert [path.name for path in (place / "run" / "logs").iterdir()] == ["tell.jsonl"]


def test_names_are_checked():
    assert make_config({"train": {"report_to": ["mlflow", "trackio"]}}).train.report_to == ("mlflow", "trackio")
    with pytest.raises(TellError, match=r"train\.report_to"):
        make_config({"train": {"report_to": ["comet"]}})
