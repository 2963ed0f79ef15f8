"""examples/minimal.py: a whole run by the calls that `tell tune` makes, in at most 60 lines."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from homes import home_with_kernels

PATH = Path(__file__).parents[2] / "examples" / "minimal.py"


def test_the_example_is_short_and_ends_with_a_report(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TELL_HOME", str(home_with_kernels(tmp_path / "home")))
    assert len(PATH.read_text(encoding="utf-8").splitlines()) <= 60
    spec = importlib.util.spec_from_file_location("minimal", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = module.main(str(tiny_model("llama")), str(tmp_path / "run"))
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    assert set(metrics["arms"]) == {"base", "sft-matched", "tell"} and metrics["train"]["arms"]["tell"]["steps"] > 0
    assert folder.read_status()["state"] == "done" and folder.report.is_file() and folder.manifest.is_file()
    assert "sft-matched" in capsys.readouterr().out
