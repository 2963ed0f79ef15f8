"""`tell tune` under torchrun: a run folder with the numbers of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tell
from study.runs import FILES, comparable, config_of, read
from tell.cli.main import run
from tell.errors import TellError
from tell.run import RunFolder

PLAIN = {"eval": {"arms": ["base", "sft", "tell"]}, "generate": {"greedy": True}}


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tell"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tell.__file__).parents[1])}
    return subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=1500)


def near(a: Any, b: Any, path: str = "") -> None:
    """Equal, numbers within rounding."""
    if isinstance(b, dict):
        assert a.keys() == b.keys(), path
        for key in b:
            near(a[key], b[key], f"{path}.{key}")
    elif isinstance(b, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            near(x, y, f"{path}.{i}")
    else:
        assert a == (pytest.approx(b, rel=1e-3, abs=1e-4) if isinstance(b, float) else b), path


@pytest.fixture(scope="module", params=["auto", "fsdp"])
def pair(request, tiny_model, tmp_path_factory) -> tuple[RunFolder, RunFolder, str, Path]:
    """A run by one process and one by two, what the two wrote, and their configuration."""
    place = tmp_path_factory.mktemp(request.param)
    fast = "auto" if request.param == "auto" else "off"
    alone = config_of(tiny_model("llama"), place / "one", **PLAIN, train={"fast": fast})
    one = tell.tune(alone)
    file = place / "run.yaml"
    train = alone.train.model_copy(update={"parallel": request.param})
    file.write_text(alone.model_copy(update={"train": train, "out": str(place / "two")}).to_yaml())
    done = torchrun("tune", "-c", str(file))
    assert done.returncode == 0, done.stderr
    return one, RunFolder(place / "two"), done.stdout, file


def test_two_processes_leave_the_run_of_one(pair):
    one, two, shown, _ = pair
    assert all((two.root / name).exists() for name in FILES)
    assert sorted(p.name for p in one.root.rglob("*") if "tfevents" not in p.name) == sorted(
        p.name for p in two.root.rglob("*") if "tfevents" not in p.name
    )
    assert two.manifest.read_bytes() == one.manifest.read_bytes()
    near(comparable(read(two.metrics)), comparable(read(one.metrics)))
    assert two.read_status()["state"] == "done"
    assert "trained by 2 processes" in " ".join(read(two.findings)["notices"])
    assert shown.count(f"tell chat {two.root}") == 1  # the second process shows nothing


def test_their_run_goes_on_in_one_process(pair, tmp_path):
    _, two, _, file = pair
    before = comparable(read(two.metrics))
    two.metrics.unlink()
    two.prediction("tell").unlink()
    config = tell.load_config(file, overrides=["train.parallel=auto"])
    tell.tune(config, resume=True)
    assert comparable(read(two.metrics)) == before


def test_bad_input_ends_both(pair):
    *_, file = pair
    done = torchrun("tune", "-c", str(file))
    assert done.returncode != 0 and "exists already" in done.stderr


def test_spreading_weights_needs_processes(tiny_model, tmp_path):
    config = config_of(tiny_model("llama"), tmp_path / "run", train={"parallel": "fsdp"})
    with pytest.raises(TellError, match="needs several processes"):
        tell.tune(config)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def launched(monkeypatch) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("sections", "what"),
    [({"generate": {"engine": "vllm"}}, "vLLM does not run"), ({"max_minutes": 5.0}, "times are measured")],
)
def test_what_several_processes_refuse(launched, tiny_model, tmp_path, sections, what):
    config = config_of(tiny_model("llama"), tmp_path / "run", train={"parallel": "fsdp"}, **sections)
    with pytest.raises(TellError, match=what):
        tell.tune(config)
    assert not (tmp_path / "run").exists()


def test_other_verbs_run_in_one_process(launched, capsys):
    assert run(["report", "runs/any"]) == 2
    assert "tell report: runs in one process" in capsys.readouterr().err
