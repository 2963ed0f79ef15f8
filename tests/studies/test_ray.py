"""The same cells on a real cluster of this machine: same numbers; workers that die; inputs that travel."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import tell
from run.runs import config_of
from studies.studies import numbers
from tell.errors import TellError
from tell.studies.cells import inputs, make_cell
from tell.studies.content import content_hash, folder_files
from tell.studies.executors.ray import RayExecutor
from tell.studies.ray_worker import Input, place_inputs
from tell.studies.recipe import Resources
from tell.studies.study_folder import StudyFolder

ray_installed = pytest.mark.skipif(
    find_spec("ray") is None,
    reason='Ray is not installed: pip install "tell-llm[ray]"',
)


SMALL = {"object_store_memory": 80_000_000}


@pytest.fixture(scope="module")
def cluster(surroundings) -> Iterator[RayExecutor]:
    """A small cluster whose workers import torch once, one core to a cell."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        # Ray's workers would yield to all else on the machine, and on a busy one never come to their turn.
        patch.setenv("RAY_worker_niceness", "0")
        ray.init("local", num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False, **SMALL)
        yield RayExecutor("local", Resources(cpus=1))
    ray.shutdown()


@pytest.fixture
def unconnected() -> None:
    import ray

    ray.shutdown()


@ray_installed
def test_same_numbers_on_a_cluster(recipe, whole, cluster, home, tmp_path):
    """Inputs are laid down by content on the worker's side, and the finished cells come back whole."""
    there = tell.run_study(recipe(), root=tmp_path / "there", execution=tell.Execution(cluster))
    assert numbers(there, tmp_path / "there") == numbers(whole, whole.root.parent)
    for name, cell in there.read()["cells"].items():
        a, b = whole.root.parent / "cells" / name, tmp_path / "there/cells" / name
        assert {p.relative_to(a) for p in a.rglob("*.json*")} == {p.relative_to(b) for p in b.rglob("*.json*")}
        here = (a / "run.yaml").read_text().replace(str(whole.root.parent), str(tmp_path / "there"))
        assert here == (b / "run.yaml").read_text()
        assert str(home) not in (b / "findings.json").read_text() and cell["host"]
    laid = {path.name for path in (home / "ray/inputs").glob("*/*")}
    assert {"train.jsonl", "test.jsonl", "schema.json", "general.jsonl"} <= laid
    assert not [path for path in (home / "ray/cells").iterdir() if path.is_dir()]
    assert not tell.run_study(
        recipe(), root=tmp_path / "there", execution=tell.Execution(cluster)
    ).failed()  # nothing left to run


@ray_installed
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_worker_that_dies_is_replaced_and_a_cell_that_fails_is_noted(
    recipe, cluster, home, tmp_path, monkeypatch, number
):
    """The scorer ends its process once, or tells it to end; the second try goes on from the trained adapter."""
    mark = tmp_path / "died"
    (tmp_path / f"deadly_{number}.py").write_text(  # a worker may be that of the test before
        "import os, signal\n"
        f"from mark_{number} import mark\n"
        "def f(answers, references):\n"
        "    if not mark.exists():\n"
        "        mark.write_text(__file__)\n"
        f"        os.kill(os.getpid(), signal.{number})\n"
        "    return [len(a) / 100 for a in answers]\n",
        encoding="utf-8",
    )
    (tmp_path / f"mark_{number}.py").write_text(f"import pathlib\nmark = pathlib.Path({str(mark)!r})\n")
    monkeypatch.chdir(tmp_path)
    path = recipe(config={"task": {"scorer": f"deadly_{number}:f"}}, grid={"task.rows": [6, 600]}, arms=["sft"])
    folder = tell.run_study(path, root=tmp_path / "studies", execution=tell.Execution(cluster))
    sent = Path(mark.read_text()).parent
    assert sent.is_relative_to(home / "ray/inputs")  # the worker has it from the study, not from a folder they share
    assert {path.name for path in sent.glob("*.py")} == {f"deadly_{number}.py", f"mark_{number}.py"}
    states = {row["point"]["task.rows"]: folder.read()["cells"][row["cell"]] for row in folder.read()["rows"]}
    assert states[6]["state"] == "done" and states[6]["attempts"] == 1  # Ray's own second try
    assert states[600]["state"] == "failed" and "600 rows are requested" in states[600]["error"]


def test_inputs_travel_by_content(tiny_model, tmp_path):
    """A model folder is used where it lies, else it is laid down; files always are, once."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    (tmp_path / "anchor.txt").write_text("Sort this mail.", encoding="utf-8")
    config = make_cell(config_of(model, anchor={"text": f"@{tmp_path / 'anchor.txt'}"}), "tell").config
    found, objects = {}, {}
    for place, path in inputs(config).items():
        files = [path] if path.is_file() else folder_files(path)
        objects |= {str(file): file.read_bytes() for file in files}
        parts = tuple((file.relative_to(path).as_posix(), str(file)) for file in files)
        found[place] = Input(str(path), content_hash(path), parts)
    asked: list[str] = []

    def get(reference: str) -> bytes:
        asked.append(reference)
        return objects[reference]

    first = config.model_copy(deep=True)
    moved = place_inputs(first, found, tmp_path / "inputs", get)
    assert first.model.name == str(model)
    assert set(moved.values()) == {item.path for item in found.values()} - {str(model)}
    assert first.anchor.text.startswith(f"@{tmp_path / 'inputs'}")
    assert make_cell(first, "tell").name == make_cell(config, "tell").name
    asked.clear()
    shutil.rmtree(model)
    second = config.model_copy(deep=True)
    place_inputs(second, found, tmp_path / "inputs", get)
    assert asked and {name.startswith(str(model)) for name in asked} == {True}  # the files are there already
    assert content_hash(Path(second.model.name)) == found["model", "name"].content


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TellError, match=r"pip install .tell-llm\[ray\]"):
        RayExecutor()


@ray_installed
def test_no_cluster_to_be_found(unconnected, recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(TellError, match=r"--address .*ray start --head"):
        tell.run_study(recipe(), root=tmp_path / "studies", execution=tell.Execution("ray", "127.0.0.1:1"))
    cells = StudyFolder(tmp_path / "studies/small").read()["cells"]
    assert {cell["state"] for cell in cells.values()} == {"waiting"}


@ray_installed
def test_this_machine_will_not_grow(unconnected, recipe, tmp_path):
    executor = RayExecutor("local", Resources(cpus=64), {"num_cpus": 1, **SMALL})
    with pytest.raises(TellError, match=r"no 64 CPUs and 0 GPUs for a cell.*--cpus"):
        tell.run_study(recipe(), root=tmp_path / "studies", execution=tell.Execution(executor))


@ray_installed
def test_a_cluster_that_is_dead_is_not_waited_for(unconnected, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(TellError, match=r"no cluster can be reached.*ray start --head"):
        tell.run_study(recipe(), root=tmp_path / "studies", execution=tell.Execution("ray"))
