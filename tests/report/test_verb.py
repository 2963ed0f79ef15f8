"""``tell.write_report``: one call for one run or several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from report.sample import make_sample
from tell.errors import TellError
from tell.files import write_text
from tell.report.write import write_report


def test_one_run_writes_into_its_folder(tmp_path: Path) -> None:
    folder = make_sample(tmp_path / "run", arms=("base",), rows=12)
    assert write_report(folder.root) == folder.report and folder.report.read_text(encoding="utf-8").startswith(
        "<!doctype"
    )
    assert write_report([folder], out=tmp_path / "deep" / "page.html").is_file()


def test_several_runs_write_beside_the_first(tmp_path: Path) -> None:
    runs = [make_sample(tmp_path / name, arms=("base",), rows=12).root for name in ("a", "b")]
    path = write_report(runs)
    assert path == tmp_path / "compare.html" and "2 runs side by side" in path.read_text(encoding="utf-8")
    assert not (runs[0] / "report.html").exists()


def test_what_is_no_run_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(TellError, match="no such run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    with pytest.raises(TellError, match="has no run"):
        write_report(tmp_path / "photos")
    with pytest.raises(TellError, match="no run given"):
        write_report([])
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["photos"]


@pytest.mark.parametrize("before", ["", "import tell.report.page; "])
def test_public_call_works_whatever_was_imported_before(before: str, tmp_path: Path) -> None:
    folder = make_sample(tmp_path / "run", arms=("base",), rows=12)
    code = f"{before}import tell; print(tell.write_report({str(folder.root)!r})); from tell.report import render"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(folder.report)


def test_only_pages_that_tell_wrote_are_replaced(tmp_path: Path) -> None:
    folder = make_sample(tmp_path / "run", arms=("base",), rows=12)
    own = tmp_path / "page.html"
    assert write_report(folder, out=own) == write_report(folder, out=own) == own
    for path in (folder.report, tmp_path / "thesis.html"):
        path.write_text("<!doctype html><title>mine</title>")
        with pytest.raises(TellError, match=r"not a report by tell.*-o"):
            write_report(folder, out=None if path == folder.report else path)
        assert "mine" in path.read_text()
    with pytest.raises(TellError, match="left as it is"):
        write_report(folder, out=tmp_path)
    older = own.read_text().replace('<meta name="generator" content="tell report">', "")
    folder.report.write_text(older)
    assert write_report(folder) == folder.report and "generator" in folder.report.read_text()


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TellError, match="not a regular file"):
        write_text(tmp_path / "pipe", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_metrics_of_other_shapes_end_in_a_page_or_in_one_line(tmp_path: Path) -> None:
    folder = make_sample(tmp_path / "run", arms=("base", "tell"), rows=12)
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    for wrong in ([], "x", {"arms": [1]}, {"task": 3}, {"arms": {"tell": {"x": {"value": "a", "ci": 3}}}}, None):
        for value in (
            wrong,
            {**metrics, **(wrong if isinstance(wrong, dict) else {"arms": wrong, "forgetting": wrong})},
        ):
            folder.metrics.write_text(json.dumps(value))
            try:
                write_report(folder)
            except TellError as error:
                assert "damaged" in str(error)
