"""Cells in one file: read, rendered and resumed without their run folders."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import shutil
from pathlib import Path

import pytest

import tell
from run.runs import read
from studies.made import POINTS, make_study
from studies.studies import numbers
from tell.errors import TellError
from tell.studies.packed import main, pack_cells, read_packed
from tell.studies.page.study_page import write_study
from tell.studies.results import read_results
from tell.studies.study_folder import Root
from tell.studies.study_plan import measured_evaluation

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
    other, keep = {"root": tmp_path / "other", "out": out}, tell.Execution(keep_adapters=True)
    states = [row["state"] for row in tell.plan_study(recipe(), **other)["cells"]]
    assert sorted(states) == ["done", "done", "done", "waiting"]
    assert tell.plan_study(recipe(), execution=keep, **other)["left"]["cells"] == 4  # no adapters are packed
    assert not list((tmp_path / "other").glob("cells/*-*"))  # a plan writes no run folder
    again = tell.run_study(recipe(), **other)
    restored = [path.parent for path in (tmp_path / "other/cells").glob("*/metrics.json") if not _ran(path.parent)]
    assert len(restored) == 3
    records = [read(path) for path in (tmp_path / "other/cells").glob("*.json")]
    assert sorted(record["attempts"] for record in records) == [0, 0, 0, 1]
    assert len(measured_evaluation(Root(tmp_path / "other"))) == 1  # of the cell that ran here
    assert numbers(again, tmp_path / "other") == numbers(whole, tmp_path / "whole")
    assert _table(again.root) == _table(whole.root)


def _table(folder: Path) -> list[dict[str, str]]:
    """table.csv without the seconds, which differ for the cell that ran twice."""
    rows = csv.DictReader((folder / "table.csv").open(encoding="utf-8"))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def _ran(cell: Path) -> bool:
    return (cell / "run.yaml").exists()


def test_a_cell_that_failed_here_before_is_not_measured_by_another_machine(recipe, tmp_path):
    keys = {"arms": ["base"], "grid": {}}
    whole = tell.run_study(recipe(**keys), root=tmp_path / "whole")
    (tmp_path / "out").mkdir()
    shutil.copy(pack_cells(whole.root), tmp_path / "out")
    (name,) = whole.read()["cells"]
    root = Root(tmp_path / "other")
    root.note(name, state="failed", error="out of memory", attempts=1)
    tell.run_study(recipe(**keys), root=root.path, out=tmp_path / "out")
    assert root.record(name)["state"] == "done" and root.record(name)["evaluation"]
    assert not measured_evaluation(root)


def test_the_remedy_for_a_missing_adapter_works_beside_packed_cells(recipe, tmp_path):
    keys, root = {"arms": ["sft"], "grid": {}}, tmp_path / "studies"
    folder = tell.run_study(recipe(**keys), root=root)
    pack_cells(folder.root)
    (name,) = folder.read()["cells"]
    cell = root / "cells" / name
    shutil.rmtree(cell)
    tell.run_study(recipe(**keys), root=root)
    assert not _ran(cell)
    with pytest.raises(TellError, match=r"no run\.yaml.*Remove the cell's folder .*--keep-adapters"):
        tell.evaluate(cell)
    shutil.rmtree(cell)  # as it says
    tell.run_study(recipe(**keys), root=root, execution=tell.Execution(keep_adapters=True))
    assert tell.evaluate(cell)["arms"]["sft"]


def test_a_cell_that_runs_again_keeps_its_line(tmp_path):
    """A study that was stopped with --keep-adapters has finished cells that wait again."""
    folder = make_study(tmp_path, points=POINTS[:1], seeds=[42])
    first = pack_cells(folder).read_bytes()
    data = read(folder / "study.json")
    for cell in data["cells"].values():
        cell["state"] = "waiting"
    (folder / "study.json").write_text(json.dumps(data), encoding="utf-8")
    shutil.rmtree(tmp_path / "cells")
    assert pack_cells(folder).read_bytes() == first


def test_comparisons_of_hidden_states_are_read_and_run_again(recipe, tmp_path):
    """Their pictures are not packed: those of a study are kept until others are drawn."""
    keys = {"grid": {"anchor.text": ["Sort this mail.", "none"]}, "arms": [], "separate": {"queries": 8}}
    whole = tell.run_study(recipe(**keys), root=tmp_path / "whole")
    pack_cells(whole.root)
    shutil.rmtree(tmp_path / "whole/cells")
    before = files(whole.root / "figures")
    assert any("figure-states2" in name for name in before)
    write_study(whole.root)
    assert files(whole.root / "figures") == before and len(read_results(whole.root).outcomes) == 5
    assert "missing for 2 comparisons" in whole.page.read_text(encoding="utf-8")
    assert tell.plan_study(recipe(**keys), root=tmp_path / "whole")["left"]["cells"] == 2
    tell.run_study(recipe(**keys), root=tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("cells/*/separation.svg"))) == 2
    assert "missing for" not in whole.page.read_text(encoding="utf-8")


def test_a_name_that_could_not_be_read_is_not_written(tmp_path):
    folder = make_study(tmp_path, points=POINTS[:1], seeds=[42])
    first = pack_cells(folder).read_bytes()
    deep = next((tmp_path / "cells").glob("tell-*")) / "predictions/benchmarks/tell/deep/x.jsonl"
    deep.parent.mkdir(parents=True)
    deep.write_text("{}\n", encoding="utf-8")
    with pytest.raises(TellError, match=r"tell/deep/x\.jsonl' is not a name"):
        pack_cells(folder)
    assert (folder / "cells.jsonl.gz").read_bytes() == first


def test_the_folder_of_another_study_is_refused_before_anything_is_unpacked(recipe, tmp_path):
    keys = {"arms": ["base"], "grid": {}}
    whole = tell.run_study(recipe(**keys), root=tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(pack_cells(whole.root), out)
    (out / "index.html").write_text("mine", encoding="utf-8")
    with pytest.raises(TellError, match="which no study wrote"):
        tell.run_study(recipe(**keys), root=tmp_path / "other", out=out)
    assert not list((tmp_path / "other").glob("cells/*"))


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said(recipe, tmp_path, monkeypatch):
    keys = {"arms": ["base"], "grid": {}}
    whole = tell.run_study(recipe(**keys), root=tmp_path / "whole")
    pack_cells(whole.root)
    shutil.rmtree(tmp_path / "whole/cells")
    for name in ("atomic_folder", "tempfile.TemporaryDirectory"):
        with monkeypatch.context() as patch:
            patch.setattr(f"tell.studies.packed.{name}", full)
            with pytest.raises(TellError, match=r"cannot be written \(No space left on device\).*TMPDIR"):
                read_results(whole.root)
    monkeypatch.setattr("tell.studies.packed.atomic_folder", full)
    with pytest.raises(TellError, match=r"cells/base-\w+: cannot be written \(No space.*--root"):
        tell.run_study(recipe(**keys), root=tmp_path / "whole")


def test_the_command_reports_errors_in_one_line(tmp_path, capsys):
    folder = make_study(tmp_path, points=POINTS[:1], seeds=[42])
    next((tmp_path / "cells").glob("tell-*/metrics.json")).write_text('{"task": ', encoding="utf-8")
    for folders, what in (
        ([str(folder)], "metrics.json: is not valid JSON"),
        ([str(tmp_path)], "has no study"),
        ([], "no folder"),
    ):
        assert main(folders) == 2
        out, err = capsys.readouterr()
        assert not out and what in err and len(err.splitlines()) == 1


def test_a_damaged_run_folder_is_read_from_the_packed_copy(tmp_path):
    folder = make_study(tmp_path, points=POINTS[:1], seeds=[42])
    pack_cells(folder)
    next((tmp_path / "cells").glob("tell-*/metrics.json")).write_text("{", encoding="utf-8")
    study = read_results(folder)
    assert {outcome.arm for outcome in study.outcomes} == {"base", "sft", "tell"} and not study.missing


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
        '{"cell": "tell-0123456789abcdef", "status.json": {}}',
        '{"cell": "tell-0123456789abcdef", "metrics.json": []}',
        '{"cell": "tell-0123456789abcdef", "metrics.json": {}, "predictions/tell.jsonl": 1}',
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
