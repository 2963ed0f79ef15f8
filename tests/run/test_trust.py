"""A run folder may be somebody else's: code it names is run for nobody who has not said so again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import tell
from run.runs import config_of
from tell.cli.main import run as command
from tell.errors import TellError
from tell.run.claim import Trust

CODE = """
open({marker!r}, "w").write("x")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""
SCORER = """
open({marker!r}, "w").write("x")
def right(answers, references):
    return [float(a == r) for a, r in zip(answers, references)]
"""


@pytest.fixture(scope="module")
def shared(tiny_model, tmp_path_factory) -> Path:
    """A finished run whose run.yaml has since been made to trust code beside it."""
    root = tmp_path_factory.mktemp("shared")
    run = tell.tune(config_of(tiny_model("llama"), root / "run", eval={"arms": ["base"]})).root
    model = run / "model"
    shutil.copytree(tiny_model("llama"), model)
    (model / "own.py").write_text(CODE.format(marker=str(root / "ran-model")))
    facts = json.loads((model / "config.json").read_text())
    facts |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    facts["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (model / "config.json").write_text(json.dumps(facts))
    (root / "plain").symlink_to(tiny_model("llama"))
    (root / "evil_scorer.py").write_text(SCORER.format(marker=str(root / "ran-scorer")))
    return root


def change(shared: Path, *, code: bool, scorer: bool) -> Path:
    path = shared / "run" / "run.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["name"] = str(shared / "run" / "model") if code else str(shared / "plain")
    config["model"]["trust_remote_code"] = code
    config["task"]["scorer"] = "evil_scorer:right" if scorer else None
    path.write_text(yaml.safe_dump(config))
    for marker in shared.glob("ran-*"):
        marker.unlink()
    return shared / "run"


VERBS = {
    "chat": ["chat", "RUN", "hello", "--arm", "base"],
    "eval": ["eval", "RUN", "--arms", "base", "--rows", "2"],
    "benchmark": ["eval", "RUN", "--arms", "base", "--benchmarks", "openbookqa"],
    "separate": ["separate", "RUN", "--queries", "5"],
    "resume": ["tune", "--resume", "--out", "RUN"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_code_of_the_model_is_not_run(verb, shared, monkeypatch, capsys):
    monkeypatch.chdir(shared)
    run = change(shared, code=True, scorer=False)
    assert command([str(run) if part == "RUN" else part for part in VERBS[verb]]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "run.yaml" in line and "add --trust-remote-code" in line
    assert not list(shared.glob("ran-*"))


@pytest.mark.parametrize("verb", ["eval", "resume"])
def test_the_scorer_is_not_imported(verb, shared, monkeypatch, capsys):
    monkeypatch.chdir(shared)
    run = change(shared, code=False, scorer=True)
    assert command([str(run) if part == "RUN" else part for part in VERBS[verb]]) == 2
    flag = "--trust-scorer" if verb == "eval" else "--scorer evil_scorer:right"
    assert f"add {flag}" in capsys.readouterr().err.splitlines()[-1]
    assert not list(shared.glob("ran-*"))


def test_it_is_run_for_who_says_so(shared, monkeypatch):
    monkeypatch.chdir(shared)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    run = change(shared, code=False, scorer=True)
    found = tell.evaluate(run, arms=["base"], rows=2, trust=Trust(scorer=True))
    assert "right" in found["arms"]["base"] and (shared / "ran-scorer").exists()
    with pytest.raises(TellError, match="--trust-scorer"):
        tell.evaluate(run, arms=["base"], trust=Trust(code=True))


def test_other_verbs_need_no_scorer(shared, monkeypatch):
    monkeypatch.chdir(shared)
    run = change(shared, code=False, scorer=True)
    session = tell.chat(run, arm="base", greedy=True)
    session.close()
    assert tell.write_report(run).is_file() and not list(shared.glob("ran-*"))
