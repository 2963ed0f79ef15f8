"""``tell separate`` and ``tell anchor --compare`` as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tell.cli.main import run

ROOT = Path(__file__).parents[2]
DATA = str(ROOT / "examples/support/train.jsonl")
GENERAL = str(ROOT / "src/tell/score/probe/general.jsonl")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)


def test_separate(tiny_model, capsys):
    argv = ["separate", DATA, "--model", str(tiny_model("llama")), "--general", GENERAL, "--anchor", "Sort this mail."]
    argv += ["--queries", "8", "--layer", "1"]
    assert run([*argv, "-o", "out"]) == 0
    out, err = capsys.readouterr()
    for part in ("without anchor", "with anchor", "control", "chance of a probe 50 %", "length alone", "note:"):
        assert part in out
    assert "written to out" in err
    assert run([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    written = json.loads(Path("out/separation.json").read_text())
    assert written.pop("picture")["layer"] == 1 and written == result
    assert run([*argv, "-o", "out"]) == 2 and "--overwrite" in capsys.readouterr().err


def test_anchor_beside_one_by_hand(tiny_model, capsys):
    argv = ["anchor", DATA, "--model", str(tiny_model("llama")), "--candidates", "1", "--compare", "Sort this mail."]
    assert run([*argv, "--short-steps", "1", "--set", "train.batch_size=2"]) == 0
    out = capsys.readouterr().out
    for part in (
        "hand",
        "derived",
        "after a short run",
        "from the first hand-written",
        "chosen by the lowest validation loss",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["separate", "x.jsonl", "--queries", "no"], ["--queries: 'no' is not a whole number"]),
        (["separate", "x.jsonl", "--state", "first"], ["--state", "last or mean"]),
        (["separate", "."], ["is not a run folder", "tell tune"]),
        (["separate"], ["no task data given", "tell separate"]),
        (["separate", "x.jsonl", "--adapter", "tell", "--general", "y.jsonl"], ["--adapter", "run folder"]),
        (["anchor", "x.jsonl", "--score", "los"], ["--score: unknown score 'los'", "loss, separation, short-run"]),
        (["anchor", "x.jsonl", "--short-steps", "few"], ["--short-steps: 'few' is not a whole number"]),
    ],
)
def test_mistakes_get_one_line(argv, parts, capsys):
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    for part in parts:
        assert part in err
