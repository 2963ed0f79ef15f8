"""Several runs side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from report.sample import make_sample
from tell.errors import TellError
from tell.folder import RunFolder
from tell.report import compare


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    first = make_sample(tmp_path / "one", rows=20)
    second = make_sample(tmp_path / "two", arms=("base", "tell"), rows=20, seed=3)
    config = yaml.safe_load(second.config.read_text(encoding="utf-8"))
    config["train"]["learning_rate"] = 0.0001
    config["general"]["source"] = "<b>alpaca</b>"
    config["out"] = "elsewhere"
    second.config.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [first, second]


def test_numbers_of_both_runs_and_what_differs(runs: list[RunFolder]) -> None:
    html = compare(runs)
    shown = re.findall(r'<data value="([^"]+)">', html)
    for run in runs:
        for arm in json.loads(run.metrics.read_text(encoding="utf-8"))["arms"].values():
            assert str(arm["schema_adherence"]["value"]) in shown
    settings = html[html.index('id="settings"') : html.index('id="took"')]
    keys = re.findall(r'<th scope="row">([^<]+)</th>', settings)
    assert keys == ["general.source", "train.learning_rate"]
    assert "&lt;b&gt;alpaca&lt;/b&gt;" in settings and "0.0001" in settings
    assert "<script" not in html and "All runs answered the same test rows." in html


def test_other_test_rows_are_said(runs: list[RunFolder], tmp_path: Path) -> None:
    assert "different test rows" in compare([runs[0], make_sample(tmp_path / "three", rows=19)])


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    html = compare([make_sample(tmp_path / x / "run", arms=("base",), rows=12) for x in ("a", "b")])
    assert "a/run" in html and "b/run" in html


def test_empty_folders_and_too_few(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert "None of these runs has scores yet." in compare([RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")])
    with pytest.raises(TellError, match="two run folders"):
        compare([RunFolder(tmp_path / "a")])
    with pytest.raises(TellError, match="no such run folder"):
        compare([RunFolder(tmp_path / "a"), RunFolder(tmp_path / "c")])
