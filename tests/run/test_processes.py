"""`tell tune` under torchrun: a run folder with the numbers of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import forked
import tell
from run.runs import FILES, comparable, config_of, read
from tell.cli.main import run
from tell.errors import Diverged, TellError
from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.models.find import find_model
from tell.models.load import load_model
from tell.run import processes, train_arms

PLAIN = {"eval": {"arms": ["base", "sft", "tell", "tell-distilled"]}, "generate": {"greedy": True}}


TWO = ("--standalone", "--nproc-per-node", "2")
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tell.__file__).parents[1])}


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *TWO, "-m", "tell", *arguments]
    return subprocess.run(command, env={**os.environ, **ENV}, capture_output=True, text=True, timeout=1500)


class Launched:
    """`torchrun`, forked, as are its two processes: three interpreters would import torch for 16 CPU seconds."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.files = [folder / "out.txt", folder / "err.txt"]
        main = ("--start-method", "fork", "--run-path", str(Path(tell.__file__).with_name("__main__.py")))
        with self.files[0].open("w") as out, self.files[1].open("w") as err:
            where = {"stdout": out, "stderr": err, "module": "torch.distributed.run"}
            self.process = forked.start((*TWO, *main, *arguments), {**os.environ, **ENV}, **where)

    def ended(self) -> subprocess.CompletedProcess[str]:
        self.process.join(1500)
        return subprocess.CompletedProcess((), self.process.exitcode, *(file.read_text() for file in self.files))


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
    # once as users start it
    arguments = ("tune", "-c", str(file))
    done = torchrun(*arguments) if request.param == "auto" else Launched(place, *arguments).ended()
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


@pytest.fixture(scope="module")
def long(tiny_model, tmp_path_factory) -> tuple[RunFolder, tell.Config]:
    """A run by one process with time for a signal."""
    plain = {"eval": {"arms": ["tell"]}, "generate": {"greedy": True}, "mix": {"repeat": 60}}
    alone = config_of(tiny_model("llama"), tmp_path_factory.mktemp("long") / "one", **plain)
    return tell.tune(alone), alone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_a_run_to_go_on_with(number, long, tmp_path):
    """Sent to the launcher, which hands it on to both; the two end with the numbers of one that nobody stopped."""
    one, alone = long
    two = RunFolder(tmp_path / "two")
    (tmp_path / "run.yaml").write_text(alone.model_copy(update={"out": str(two.root)}).to_yaml())
    launched = Launched(tmp_path, "tune", "-c", str(tmp_path / "run.yaml"))
    log = two.losses("tell")
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert launched.process.exitcode is None, launched.ended()
        time.sleep(0.01)
    os.kill(launched.process.pid, number)
    stopped = launched.ended()
    steps = len(read_jsonl(log))
    assert stopped.returncode != 0 and 3 <= steps < len(read_jsonl(one.losses("tell")))
    assert two.read_status()["state"] == "interrupted" and "tell tune --resume" in stopped.stderr
    assert "started no run" not in stopped.stderr
    if number == signal.SIGTERM:  # either leaves the same folder
        resumed = Launched(tmp_path, "tune", "--resume", "--out", str(two.root)).ended()
        assert resumed.returncode == 0, resumed.stderr
    else:
        tell.tune(tell.load_config(tmp_path / "run.yaml"), resume=True)
    assert [line["step"] for line in read_jsonl(log)] == [line["step"] for line in read_jsonl(one.losses("tell"))]
    near(comparable(read(two.metrics)), comparable(read(one.metrics)))


@pytest.mark.parametrize("pair", ["fsdp"], indirect=True)  # it is refused before either kind of training is set up
def test_bad_input_ends_both(pair, tmp_path):
    *_, file = pair
    done = Launched(tmp_path, "tune", "-c", str(file)).ended()
    assert done.returncode != 0 and "already exists" in done.stderr


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


class Told:
    """Processes whose first one says ``words``; what this one agrees to is kept."""

    rank, world, leads, busy, sharded = 1, 2, False, False, True

    def __init__(self, *words: Any, at_agreement: Callable[[], Any] = lambda: None) -> None:
        self.words, self.at_agreement, self.agreed_to, self.said = list(words), at_agreement, [], []

    def broadcast(self, word: Any = None) -> Any:
        self.said.append(word)
        return self.words.pop(0) if self.words else word

    def agree(self, *_: Any) -> list[Any]:
        self.agreed_to.append(self.at_agreement())
        return []

    @contextmanager
    def agreed(self) -> Iterator[None]:
        yield


def test_shards_leave_the_gpus_before_the_first_process_answers(tmp_path, monkeypatch):
    """A helper that kept the model of the last job would leave the first process no room for the whole one."""
    models, emptied = [], []

    class Model:
        pass

    def base(*_: Any) -> tuple[Model, None]:
        model = Model()
        models.append(weakref.ref(model))
        return model, None

    monkeypatch.setattr(processes, "_base", base)
    monkeypatch.setattr(processes, "_train", lambda *_: None)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(models[-1]() is None))
    job = processes.Job("model", "bf16", None)
    told = Told(job, processes.FreeShards(), job, processes.FreeShards(), str(tmp_path))
    told.at_agreement = lambda: models[-1]() is None
    folder = processes.help_training(told, tell.load_config(flags={"out": str(tmp_path)}))
    assert folder.root == tmp_path and len(models) == 2
    assert told.agreed_to == emptied == [True, True]


def test_only_the_first_process_reads_weights_that_are_sharded(tiny_model, monkeypatch):
    config = tell.load_config(flags={"model": str(tiny_model("llama"))}, overrides=["model.device=cpu"])
    files = find_model(config.model.name)
    whole = load_model(files, device="cpu", dtype="fp32").model
    monkeypatch.setattr("tell.models.load.read_weights", None)
    job = processes.Job(files.fingerprint, "fp32", None)
    model, device = processes._base(job, config, Told(), None)
    assert device.type == "cpu" and not model.training
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    shapes = {name: (p.shape, p.dtype) for name, p in whole.named_parameters()}  # a tied weight has one name
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == shapes
    for (name, made), (_, loaded) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(made, loaded), name  # those too that are in no file
    with pytest.raises(TellError, match="is not the model of the first process"):
        processes._base(replace(job, model="other"), config, Told(), None)


@pytest.mark.parametrize(
    ("sharded", "busy", "fails", "freed"),
    [
        (True, False, None, 1),
        (True, False, Diverged("at step 2"), 1),
        (True, True, TellError("gone"), 0),
        (False, False, None, 0),
    ],
)
def test_the_first_process_asks_for_the_gpus_after_each_training(monkeypatch, sharded, busy, fails, freed):
    """Not where another process may be in mid-training: it would wait for ever."""

    def train(*_: Any) -> str:
        if fails:
            raise fails
        return "result"

    monkeypatch.setattr(train_arms, "_train", train)
    told = Told()
    told.sharded, told.busy = sharded, busy
    with nullcontext() if fails is None else pytest.raises(type(fails)):
        assert train_arms._train_and_free(None, "tell", None, None, told) == "result"
    assert told.said == [processes.FreeShards()] * freed and len(told.agreed_to) == freed


def test_shards_are_not_trained_in_fp16(launched, tiny_model, tmp_path):
    config = config_of(tiny_model("llama"), tmp_path / "run", train={"parallel": "fsdp"})
    config.model.dtype = "fp16"
    with pytest.raises(TellError, match="shards are not trained in fp16"), processes.processes_of(config):
        pass


def test_a_quantised_base_is_not_sharded(launched, tiny_model, tmp_path):
    config = config_of(tiny_model("llama"), tmp_path / "run", train={"parallel": "fsdp"})
    config.model.base = "nf4"
    with pytest.raises(TellError, match="quantised weights are not sharded"), processes.processes_of(config):
        pass
