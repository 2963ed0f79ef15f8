"""Cells in one file: read, rendered and resumed without their run folders."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

import tell
from studies.made import POINTS, make_study
from studies.studies import numbers
from tell.errors import TellError
from tell.studies.packed import main, pack_cells, read_packed
from tell.studies.page.study_page import write_study
from tell.studies.results import read_results

RESULTS = Path(__file__).parents[2] / "docs/results"


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.endswith(".gz")}


def test_rendered_from_packed_cells_as_from_run_folders(tmp_path):
    asked = {"x": "general.tokens", "y": "schema_adherence"}
    recipe = {"figures": [asked], "fits": [asked], "pareto": [{"gain": "schema_adherence", "cost": "probe"}]}
    folder = make_study(tmp_path, recipe=recipe)
    write_study(folder)
    before = files(folder)
    packed = pack_cells(folder)
    first = packed.read_bytes()
    assert pack_cells(folder).read_bytes() == first  # the same cells, the same bytes
    shutil.rmtree(tmp_path / "cells")
    shutil.copytree(folder, tmp_path / "alone")
    write_study(tmp_path / "alone")
    assert files(tmp_path / "alone") == before
    assert pack_cells(folder).read_bytes() == first  # lines of cells without a run folder stay


def test_a_study_goes_on_from_packed_cells(recipe, tmp_path):
    """Packed cells are not run again; one that was not packed is."""
    whole = tell.run_study(recipe(), root=tmp_path / "whole")
    main([str(whole.root)])
    lines = gzip.decompress(whole.packed.read_bytes()).splitlines(keepends=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "cells.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[1:])))
    states = [row["state"] for row in tell.plan_study(recipe(), root=tmp_path / "other", out=out)["cells"]]
    assert sorted(states) == ["done", "done", "done", "waiting"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "other/cells").glob("*/metrics.json")}
    again = tell.run_study(recipe(), root=tmp_path / "other", out=out)
    assert len(times) == 3 and all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert numbers(again, tmp_path / "other") == numbers(whole, tmp_path / "whole")
    assert (again.root / "table.csv").read_bytes() == (whole.root / "table.csv").read_bytes()


def test_a_finished_cell_that_is_nowhere_cannot_be_packed(tmp_path):
    folder = make_study(tmp_path, points=POINTS[:1], seeds=[42])
    shutil.rmtree(tmp_path / "cells")
    with pytest.raises(TellError, match=r"has no cell .*Run the study again"):
        pack_cells(folder)
    assert not (folder / "cells.jsonl.gz").exists()


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"metrics.json": {}}',
        '{"cell": "../../etc-0123456789abcdef"}',
        '{"cell": "tell-0123456789abcdef", "../metrics.json": {}}',
        '{"cell": "tell-0123456789abcdef", "predictions/../../x.jsonl": []}',
        '{"cell": "tell-0123456789abcdef", "run.yaml": {}}',
    ],
)
def test_what_was_not_packed_by_us_is_refused(tmp_path, line):
    path = tmp_path / "cells.jsonl.gz"
    path.write_bytes(gzip.compress(line.encode()))
    with pytest.raises(TellError, match=r"cells\.jsonl\.gz: is damaged"):
        list(read_packed(path))
    path.write_bytes(b"no gzip")
    with pytest.raises(TellError, match="is damaged"):
        list(read_packed(path))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/study.json")), ids=lambda path: path.parent.name)
def test_stored_results_can_be_read(path):
    """Every finished cell of every stored study has its numbers in the repository."""
    study = read_results(path.parent)
    finished = [
        name for name, cell in json.loads(path.read_text(encoding="utf-8"))["cells"].items() if cell["state"] == "done"
    ]
    assert {outcome.cell for outcome in study.outcomes} == set(finished) and not study.missing["unreadable"]
    assert study.metrics()
