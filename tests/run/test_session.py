"""Which engine a run decodes with."""

from __future__ import annotations

import sys
import types
import weakref
from types import SimpleNamespace

import pytest
import torch

from tell.config import make_config
from tell.decode.engine import Engine
from tell.errors import TellError
from tell.models.find import find_model
from tell.rows.template import ChatTokenizer
from tell.run.session import ModelCache, Session, _vllm_engine
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
        assert "vLLM does not start" in _vllm_engine(files, loaded, config_for("auto"))
    with pytest.raises(TellError, match=r"vLLM does not start \(no room for the cache\)\. Use generate\.engine=own"):
        _vllm_engine(files, loaded, config_for("vllm"))
