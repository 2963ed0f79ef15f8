"""Which engine a run decodes with."""

from __future__ import annotations

import sys
import types
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from run.runs import config_of
from tell.config import make_config
from tell.decode.engine import Engine
from tell.errors import TellError
from tell.folder import RunFolder
from tell.models.find import find_model
from tell.models.machine import Place
from tell.rows.template import ChatTokenizer
from tell.run import session as sessions
from tell.run import tune
from tell.run.journal import Journal
from tell.run.session import ModelCache, Session, _vllm_engine
from tell.run.task import load_task
from train.packed import load


def config_for(engine: str):
    return make_config({"model": {"device": "cpu"}, "generate": {"engine": engine}})


def session_of(folder, engine: str, **more) -> Session:
    return Session(find_model(str(folder)), config_for(engine), ChatTokenizer(folder), **more)


def test_our_engine_decodes_on_a_processor(tiny_model):
    folder = tiny_model("llama")
    loaded, engine = session_of(folder, "auto").load()
    assert isinstance(engine, Engine) and engine.model is loaded.model
    with pytest.raises(TellError, match=r"generate\.engine: vLLM (is not installed|needs a GPU)"):
        session_of(folder, "vllm").load()
    assert isinstance(session_of(folder, "vllm", stream=True).engine, Engine)


def test_memory_of_a_dropped_model_is_given_back(tiny_model, monkeypatch):
    """What torch keeps for itself, vLLM would find taken; given back once nothing holds the model."""
    emptied, gone = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(list(gone)))
    models, folder = ModelCache(), tiny_model("llama")
    weakref.finalize(session_of(folder, "own", models=models).model, gone.append, True)
    assert not emptied and session_of(folder, "own", models=models).model is models.held[0].model
    models.drop()
    assert emptied == [[True]]
    ModelCache().drop()
    models.drop()
    assert len(emptied) == 1


def test_a_released_model_is_given_back(tiny_model):
    """Weights spread over processes may not fit next to a whole copy, so nothing keeps one."""
    gone: list[bool] = []
    session = session_of(tiny_model("llama"), "own")
    weakref.finalize(session.model, gone.append, True)
    session.release()
    assert gone and session.model is not None


def test_vllm_that_does_not_start(tiny_model, monkeypatch):
    """By name it is an error, else our own engine decodes and a warning says why."""

    def refuse(**settings):
        raise RuntimeError("no room for the cache\nmore of it")

    vllm = types.ModuleType("vllm")
    vllm.LLM = refuse
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    files = find_model(str(tiny_model("llama")))
    loaded = SimpleNamespace(model=load(tiny_model("llama")), dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"vLLM does not start \(no room for the cache\)"):
        assert "vLLM does not start" in _vllm_engine(files, loaded, config_for("auto"), lambda: None)
    with pytest.raises(TellError, match=r"vLLM does not start \(no room for the cache\)\. Use generate\.engine=own"):
        _vllm_engine(files, loaded, config_for("vllm"), lambda: None)


@pytest.mark.parametrize("engine", ["auto", "vllm"])
def test_only_vllm_by_name_has_no_engine_to_fall_back_on(engine, tiny_model, monkeypatch):
    given = []
    monkeypatch.setattr("tell.decode.vllm_engine.VllmEngine", lambda *_, own, **more: given.append(own))
    monkeypatch.setattr("tell.run.session.pick_engine", lambda *_: "vllm")
    loaded, _ = session_of(tiny_model("llama"), engine).load()
    assert given == [None] if engine == "vllm" else given[0]().model is loaded.model


@pytest.mark.parametrize(("free", "held", "refused"), [(30, False, True), (100, False, False), (30, True, False)])
def test_a_model_that_cannot_be_trained_here_is_refused_before_it_is_loaded(
    free, held, refused, tiny_model, tmp_path, monkeypatch
):
    """Not by free memory where a model of this process has taken it already."""
    model = tiny_model("llama")
    size = 2 * find_model(str(model)).architecture.parameters
    monkeypatch.setattr(sessions, "likely_place", lambda *_: Place("cuda", "bf16"))
    monkeypatch.setattr(sessions, "gpu_memory", lambda: (size * 1.2, size * 0.012 * free))
    monkeypatch.setattr("tell.models.load.choose_device", lambda name: torch.device("cuda"))
    task = load_task(config_of(model, tmp_path / "run"))
    models, journal = ModelCache(), Journal.of(RunFolder(tmp_path / "run"))
    models.held = object() if held else None
    with pytest.raises(TellError, match=r"no room to train.*nf4.*fsdp") if refused else nullcontext():
        tune.open_session(task, journal, models)
    tune.open_session(task, journal, models, SimpleNamespace(sharded=True))  # shards have room elsewhere
    task.config.eval.arms = ["base"]
    tune.open_session(task, journal, models)  # answers need no room to train
    assert not (tmp_path / "run").exists()


def test_a_sharded_run_computes_in_the_format_of_its_shards(tiny_model, tmp_path, monkeypatch):
    """On a GPU with fp16 and no bf16, which shards cannot be trained in."""
    task = load_task(config_of(tiny_model("llama"), tmp_path / "run"))
    journal = Journal.of(RunFolder(tmp_path / "run"))
    task.config.model.dtype = "auto"
    for name, expected in (("torch.float16", "fp32"), ("torch.bfloat16", "auto")):
        monkeypatch.setattr("tell.run.processes._auto_dtype", lambda config, name=name: name)
        session = tune.open_session(task, journal, None, SimpleNamespace(sharded=True))
        assert session.config.model.dtype == expected
        assert tune.open_session(task, journal, None, SimpleNamespace(sharded=False)).config.model.dtype == "auto"
    assert [text for text in task.notices.texts if "fp32" in text] == [
        "the run computes in fp32: shards are not trained in fp16, and the GPU has no bf16"
    ]
