"""Studies run on a tiny random model: shared cells, failures, signals, progress."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import yaml
from filelock import FileLock

import tell
import tell.run.choose_anchor as choose
from run.runs import Killer, read
from studies.studies import numbers
from tell.cli.main import run
from tell.errors import Interrupted, TellError
from tell.files import write_json
from tell.progress import Silent
from tell.run.stop import Stop
from tell.studies.executors.local import LocalExecutor
from tell.studies.open_study import open_study
from tell.studies.queue import CellQueue
from tell.studies.results import read_results
from tell.studies.run_cell import Outcome
from tell.studies.stats.seed_means import Bootstrap
from tell.studies.study_folder import Root
from tell.studies.study_plan import Planner, measured_evaluation

MINIMAL = {"grid": {}, "arms": ["base"]}


def times(root) -> dict[str, int]:
    """When each cell was last scored."""
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob("cells/*/metrics.json")}


def test_a_study_from_recipe_to_page(recipe, tmp_path):
    shown = Silent()
    folder = tell.run_study(recipe(), root=tmp_path / "studies", display=shown)
    assert folder.root == tmp_path / "studies/small" and folder.page.exists() and not folder.failed()
    data = folder.read()
    assert [(row["arm"], row["point"]["general.rows"]) for row in data["rows"]] == [
        (arm, rows) for rows in (0, 8) for arm in ("base", "sft", "tell")
    ]
    assert len(data["cells"]) == 4 and data["title"] == "small" and data["created"]
    for name, cell in data["cells"].items():
        assert cell["state"] == "done" and cell["attempts"] == 1 and cell["seconds"] > 0 and cell["host"]
        metrics = read(tmp_path / "studies/cells" / name / "metrics.json")
        assert list(metrics["arms"]) == [name.rpartition("-")[0]]
        assert not list((tmp_path / "studies/cells" / name).rglob("*.safetensors"))  # adapters of finished cells go
    ended = [text for text in shown.notes if text.startswith("✓")]
    assert len(ended) == 4 and ended[-1].startswith("✓ 4/4 tell, general.rows 8, seed 42: field accuracy")
    assert yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))["seeds"] == [42]


def test_losses_on_general_rows_are_read_back_row_by_row(whole):
    """Their means are what metrics.json says, and cells are paired by them."""
    study = read_results(whole.root)
    for outcome in study.outcomes:
        for name in ("probe loss", "probe loss change", "general held out loss", "general held out loss change"):
            number = outcome.measured.numbers[name]
            assert number.rows is not None and len(number.rows.hashes) == 4
            assert number.rows.metric.value == pytest.approx(number.value, abs=2e-6)
    sft, most = (next(o for o in reversed(study.outcomes) if o.arm == arm) for arm in ("sft", "tell"))
    gap = Bootstrap(study).difference([most], [sft], "probe")
    losses = [o.measured.numbers["probe loss"].rows.metric.per_row for o in (most, sft)]
    assert gap["value"] == pytest.approx(np.mean(losses[0] - losses[1]), abs=1e-5)
    low, high = (losses[0] - losses[1]).min(), (losses[0] - losses[1]).max()
    assert low - 1e-6 <= gap["ci"][0] <= gap["ci"][1] <= high + 1e-6  # of the same rows: never outside what one shows


def test_finished_cells_are_never_run_again(recipe, tmp_path):
    """Whatever study asked for them; a study that is done only writes its page anew."""
    root = tmp_path / "studies"
    first = tell.run_study(recipe("one"), root=root)
    before, created = times(root), first.read()["created"]
    first.page.unlink()
    again = tell.run_study(recipe("one"), root=root)
    assert times(root) == before and again.page.exists() and again.read()["created"] == created
    other = tell.run_study(
        recipe("two", grid={"general.rows": [8, 12]}, arms=["base", "tell"]), root=root, out=tmp_path / "out" / "two"
    )
    after = times(root)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    assert other.root == tmp_path / "out/two" and other.page.exists() and len(other.read()["cells"]) == 3


def test_an_anchor_is_written_once_for_cells_that_share_it(recipe, tmp_path, monkeypatch):
    """General data has no part in it; other task rows have."""
    asked = []
    real = choose.write_anchor_candidates
    monkeypatch.setattr(
        choose, "write_anchor_candidates", lambda task, *rest: asked.append(task.train) or real(task, *rest)
    )
    grid = {"task.rows": [5, 6], "general.rows": [4, 8]}
    path = recipe(grid=grid, arms=["tell"], config={"anchor": {"text": "auto", "candidates": 1}})
    folder = tell.run_study(path, root=tmp_path / "studies")
    assert not folder.failed() and [len(rows) for rows in asked] == [5, 6]
    texts = {name: read(tmp_path / "studies/cells" / name / "anchor.json")["text"] for name in folder.read()["cells"]}
    assert len(texts) == 4 and all(texts.values())


def test_no_torch_where_nothing_is_run(recipe, tmp_path):
    root = tmp_path / "studies"
    code = "import sys; from tell.cli.main import run; assert run(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    argv = ["study", str(recipe()), "--root", str(root)]

    def free_of_torch(*more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *argv, *more], capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    plan = json.loads(free_of_torch("--dry-run", "--json"))
    assert [row["state"] for row in plan["cells"]] == ["waiting"] * 4 and plan["left"] == plan["total"]
    tell.run_study(argv[1], root=root)
    plan = json.loads(free_of_torch("--dry-run", "--json"))
    assert [row["state"] for row in plan["cells"]] == ["done"] * 4 and plan["left"]["cells"] == 0
    for row in plan["cells"]:
        trained = read(root / "cells" / row["cell"] / "metrics.json")["train"]
        assert (row["steps"], row["tokens"], row["flops"]) == (trained["steps"], trained["tokens"], trained["flops"])
        assert "evaluation measured" in row["basis"]
    assert json.loads(free_of_torch("--json"))["folder"] == str(root / "small")
    other = tell.plan_study(recipe("other", seeds=[5], arms=["base"]), root=root)["cells"]
    assert all("evaluation measured" in row["basis"] for row in other)  # by cells of another study


def test_a_failed_cell_is_noted_and_the_others_go_on(recipe, tmp_path, capsys):
    """600 rows are more than there are."""
    path = recipe(grid={"task.rows": [600, 6]}, arms=["tell", "base"], config={"general": {"rows": 4}})
    argv = ["study", str(path), "--root", str(tmp_path / "studies")]
    assert run([*argv, "--dry-run", "--json"]) == 1
    out, said = capsys.readouterr()
    left = json.loads(out)["left"]
    assert (left["cells"], left["unplanned"]) == (3, 1)
    assert "1 of 3 cells to do cannot be run" in said and "600 rows are requested" in said
    assert run(argv) == 1
    said = capsys.readouterr().err
    assert "1 cells failed" in said and "600 rows are requested" in said
    data = read(tmp_path / "studies/small/study.json")
    states = {row["point"]["task.rows"]: data["cells"][row["cell"]] for row in data["rows"] if row["arm"] == "tell"}
    assert states[600]["state"] == "failed" and "600 rows are requested" in states[600]["error"]
    assert states[6]["state"] == "done" and states[600]["error"].count("\n") == 0
    assert run(argv) == 1 and run([*argv, "--dry-run"]) == 0
    assert "600 rows are requested" in capsys.readouterr().out
    attempts = [read(tmp_path / "studies/small/study.json")["cells"]]
    assert run([*argv, "--retry-failed"]) == 1
    attempts.append(read(tmp_path / "studies/small/study.json")["cells"])
    tried = [sorted(cell["attempts"] for cell in cells.values()) for cells in attempts]
    assert tried == [[1, 1, 1], [1, 1, 2]]


def test_a_cell_that_failed_goes_on_where_it_was(recipe, tmp_path, monkeypatch):
    """A scorer that raises what it likes, until its file is there: training is not repeated."""
    code = "from pathlib import Path\nWHERE = Path(__file__).parent / 'there'\n"
    code += "def f(a, r): return [0.5 for _ in a] if WHERE.exists() else 1 / 0\n"
    (tmp_path / "scores_of_a_study.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    path = recipe(**MINIMAL | {"arms": ["sft"]}, config={"task": {"scorer": "scores_of_a_study:f"}})
    folder = tell.run_study(path, root=tmp_path / "studies")
    (name, error), *_ = folder.failed().items()
    assert "division by zero" in error
    assert (tmp_path / "studies/cells" / name / "arms/sft/adapter_model.safetensors").exists()
    (tmp_path / "there").touch()
    assert not tell.run_study(path, root=tmp_path / "studies", execution=tell.Execution(retry_failed=True)).failed()
    assert folder.read()["cells"][name]["attempts"] == 2
    assert not measured_evaluation(Root(tmp_path / "studies"))  # what the first session took is in no record


def test_numbers_of_files_that_changed_meanwhile_are_thrown_away(recipe, tmp_path, monkeypatch):
    """A scorer is edited in the midst of the first cell: none keeps numbers of code that it is not named by."""
    path = tmp_path / "scores_that_change.py"
    code = "from pathlib import Path\ndef f(a, r):\n    path = Path(__file__)\n    text = path.read_text()\n"
    code += "    path.write_text(text.replace('0.' + '25', '0.75'))\n    return [0.25 for _ in a]\n"
    path.write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    study = recipe(**MINIMAL | {"arms": ["base", "base+anchor"]}, config={"task": {"scorer": "scores_that_change:f"}})
    folder = tell.run_study(study, root=tmp_path / "studies")
    failed, before = folder.failed(), set(folder.read()["cells"])
    assert set(failed) == before and len(before) == 2 and not folder.page.exists()
    assert all("scores_that_change:f changed while the study ran: start it again" in text for text in failed.values())
    assert not [name for name in before if (tmp_path / "studies/cells" / name).exists()]
    folder = tell.run_study(study, root=tmp_path / "studies")
    assert not folder.failed() and not before & set(folder.read()["cells"])
    assert {o.measured.metrics["f"].value for o in read_results(folder.root).outcomes} == {0.75}
    path.write_text(code, encoding="utf-8")  # as it was: its cells are to be run
    queue = CellQueue(open_study(study, root=tmp_path / "studies"), display=Silent(), stop=Stop(tmp_path))
    assert {cell.name for cell in queue.waiting} == before


def test_a_signal_at_the_end_of_a_cell_stops_the_study_too(recipe, tmp_path, monkeypatch):
    """It comes when the run asks no more: the run is finished, and the study goes no further."""
    import tell.run.tune as page

    write_page = page.write_page

    def interrupted(folder, **options):
        signal.raise_signal(signal.SIGTERM)
        write_page(folder, **options)

    monkeypatch.setattr(page, "write_page", interrupted)
    with pytest.raises(Interrupted, match="stopped with 1 of 4 cells done"):
        tell.run_study(recipe(), root=tmp_path / "studies")
    states = [cell["state"] for cell in read(tmp_path / "studies/small/study.json")["cells"].values()]
    assert sorted(states) == ["done", "waiting", "waiting", "waiting"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_resumably(recipe, whole, tmp_path, number):
    """In the middle of a cell; the next call goes on from there, and ends with the numbers of an undisturbed study."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=r"of 4 cells done.*same command again") as stopped:
        tell.run_study(recipe(), root=tmp_path / "studies", display=Killer("study", 9, number))
    assert stopped.value.exit_code == 130
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    states = [cell["state"] for cell in read(tmp_path / "studies/small/study.json")["cells"].values()]
    assert set(states) <= {"done", "waiting"} and "waiting" in states
    assert (tmp_path / "studies/small/index.html").exists() == ("done" in states)  # it can be read meanwhile
    folder = tell.run_study(recipe(), root=tmp_path / "studies")
    assert numbers(folder, tmp_path / "studies") == numbers(whole, whole.root.parent)


def test_what_kills_its_process_is_left_for_last(recipe, tmp_path):
    """Begun twice and never ended: the others go first. Begun once, it keeps its place."""
    study = open_study(recipe(), root=tmp_path / "studies")
    first, second, *_ = (cell.name for cell in study.cells)
    study.root.note(first, state="running", attempts=2)
    study.root.note(second, state="running", attempts=1)
    names = [cell.name for cell in CellQueue(study, display=Silent(), stop=Stop(tmp_path)).waiting]
    assert names[0] == second and names[-1] == first and len(names) == 4


def test_a_cell_that_cannot_be_planned_keeps_no_other_from_it(recipe, tmp_path, monkeypatch):
    real = Planner._plan
    calls = []

    def once(self, config):
        calls.append(config)
        if len(calls) == 1:
            raise RuntimeError("a fault of ours")
        return real(self, config)

    monkeypatch.setattr(Planner, "_plan", once)
    cells = tell.plan_study(recipe(), root=tmp_path / "studies")["cells"]
    assert [row["error"] for row in cells] == ["RuntimeError: a fault of ours", None, None, None]


def test_adapters_are_kept_where_asked(recipe, tmp_path):
    path = recipe(**MINIMAL | {"arms": ["sft"]})
    tell.run_study(path, root=tmp_path / "studies", execution=tell.Execution(keep_adapters=True))
    assert list((tmp_path / "studies/cells").rglob("adapter_model.safetensors"))


def test_one_model_for_all_cells(recipe, tmp_path, monkeypatch):
    """It is loaded once, and anew only after a cell that failed."""
    from tell.models import load

    loaded = []
    original = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *a, **k: loaded.append(a) or original(*a, **k))
    tell.run_study(recipe(), root=tmp_path / "studies")
    assert len(loaded) == 1
    (tmp_path / "scores_that_fail.py").write_text("def f(a, r): raise ValueError('no')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    path = recipe(config={"task": {"scorer": "scores_that_fail:f"}}, arms=["base", "sft"], grid={})
    assert len(tell.run_study(path, root=tmp_path / "studies").failed()) == 2
    assert len(loaded) == 3


def test_the_untuned_model_is_measured_once(recipe, tmp_path, monkeypatch):
    """Three sets of general rows, and validation rows with and without the anchor: not anew for each cell."""
    from tell.train import row_losses

    calls = []
    original = row_losses.row_losses
    monkeypatch.setattr(row_losses, "row_losses", lambda *a, **k: calls.append(a) or original(*a, **k))
    tell.run_study(recipe(config={"eval": {"forgetting_answers": 2}}), root=tmp_path / "studies")
    assert len(calls) == (3 + 2) + 3 * (3 + 1)  # the untuned model's own, and each of three trained ones'
    changes = [
        read(path)["forgetting"]["differences"]
        for path in (tmp_path / "studies/cells").glob("*/metrics.json")
        if not path.parent.name.startswith("base")
    ]
    assert len(changes) == 3 and all(len(next(iter(change.values()))) == 3 for change in changes)


def test_a_dry_run_of_a_study_that_cannot_run_is_bad_input(recipe, tmp_path, capsys):
    path = recipe(**{**MINIMAL, "config": {"model": {"name": str(tmp_path / "nowhere")}}})
    assert run(["study", str(path), "--root", str(tmp_path / "studies"), "--dry-run"]) == 2
    out, said = capsys.readouterr()
    assert "1 of 1 cells to do cannot be run" in said and said.count("nowhere") == 1
    assert "without 1 that cannot be planned" in " ".join(out.split()) and "times:" not in out


def test_a_cell_that_another_process_runs_is_waited_for(recipe, tmp_path):
    """Its lock is held; when its holder lets go without having finished it, it is run here."""
    root = tmp_path / "studies"
    path = recipe(**MINIMAL)
    plan = tell.plan_study(path, root=root)
    name = plan["cells"][0]["cell"]
    (root / "cells/.locks").mkdir(parents=True)
    lock = FileLock(root / "cells/.locks" / f"{name}.lock", thread_local=False)
    lock.acquire()
    seen: list[str] = []

    def let_go() -> None:
        seen.append(read(root / "small/study.json")["cells"][name]["state"])
        lock.release()

    timer = threading.Timer(1.5, let_go)
    timer.start()
    folder = tell.run_study(path, root=root)
    assert seen == ["running"] and folder.read()["cells"][name]["state"] == "done"


def test_a_cell_finished_elsewhere_in_the_meantime_is_taken_as_it_is(recipe, tmp_path):
    """Two studies at once: the second finds the cell done when its turn comes."""
    root = tmp_path / "studies"

    class Late(LocalExecutor):
        def run(self, queue):
            tell.run_study(recipe("other", **MINIMAL), root=root)
            self.before = times(root)
            super().run(queue)

    executor = Late()
    folder = tell.run_study(recipe("first", **MINIMAL), root=root, execution=tell.Execution(executor))
    assert times(root) == executor.before and len(folder.read()["cells"]) == 1
    assert next(iter(folder.read()["cells"].values()))["attempts"] == 1


def test_inputs_may_move_between_two_calls(recipe, tmp_path):
    """A killed cell goes on although its files lie elsewhere now: its name says that they are the same."""
    moved = tmp_path / "moved"
    moved.mkdir()
    source = yaml.safe_load(recipe().read_text(encoding="utf-8"))["config"]["task"]["data"]
    os.link(source, moved / "train.jsonl")
    with pytest.raises(Interrupted):
        tell.run_study(recipe(), root=tmp_path / "studies", display=Killer("study", 9))
    folder = tell.run_study(
        recipe(), root=tmp_path / "studies", changes=tell.Changes(overrides=[f"task.data={moved / 'train.jsonl'}"])
    )
    assert {cell["state"] for cell in folder.read()["cells"].values()} == {"done"} and len(folder.read()["cells"]) == 4


def test_data_sets_are_built_once_by_content(tmp_path, tiny_model, recipe):
    rows = [
        {"ID": str(i), "user_query": f"Name {i} rivers of {place}.", "chatgpt_response": f"Here are {i}: ...",
         "hallucination": "yes" if i % 3 == 0 else "no", "hallucination_spans": ["Here are"] if i % 3 == 0 else []}
        for i, place in enumerate(["Iceland", "France", "Peru", "Chad", "Oman", "Laos", "Cuba", "Fiji"] * 4, 2)
    ]  # fmt: skip
    (tmp_path / "halu.jsonl").write_text("\n".join(map(json.dumps, rows[:20])), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows[20:])), encoding="utf-8")
    build = {"halu": {"dataset": "halu-cot-json", "source": "${data}/halu.jsonl", "test": "${data}/test.jsonl"}}
    task = {"data": "${halu}/train.jsonl", "test": "${halu}/test.jsonl", "schema": "${halu}/schema.json"}
    keys = {"config": {"task": task, "general": {"rows": 4}}, **MINIMAL}
    path, root = recipe(build=build, **keys), tmp_path / "studies"
    plan = tell.plan_study(path, data=tmp_path, root=root)
    (made,) = (p for p in (root / "data").iterdir() if not p.name.startswith("."))
    assert made.name.startswith("halu-cot-json-") and len((made / "train.jsonl").read_text().splitlines()) == 20
    before = (made / "train.jsonl").stat().st_mtime_ns
    assert tell.plan_study(path, data=tmp_path, root=root)["cells"] == plan["cells"]
    assert (made / "train.jsonl").stat().st_mtime_ns == before
    for wrong, said in (
        ({"dataset": "halu-cot-jsn"}, "did you mean halu-cot-json?"),
        ({"sauce": "x"}, "unknown option sauce; did you mean source?"),
    ):
        with pytest.raises(TellError, match=r"build\.halu") as error:
            tell.plan_study(recipe(build={"halu": {**build["halu"], **wrong}}, **keys), data=tmp_path, root=root)
        assert said in str(error.value)


def test_words_on_the_command_line(recipe, tmp_path, capsys):
    path = str(recipe())
    for argv, said in (
        (["--seeds", "a"], "--seeds: 'a' is not a list of seeds"),
        (["--var", "x"], "--var: 'x' is not of the form name=value"),
        (["--executor", "rya"], "did you mean ray?"),
        (["--set", "task.row=3"], "did you mean task.rows?"),
    ):
        assert run(["study", path, "--root", str(tmp_path), *argv]) == 2
        assert said in capsys.readouterr().err
    assert run(["study", path, "--root", str(tmp_path), "--dry-run", "--seeds", "1,2"]) == 0
    assert "8 cells" in capsys.readouterr().out


def opened(path, root, **rules):
    study = open_study(path, root=root)
    return study, CellQueue(study, display=Silent(), stop=Stop(study.folder.root), **rules)


def test_a_cell_that_fails_elsewhere_is_not_run_again(recipe, tmp_path):
    """Whoever looked while it ran, and whether failed ones are to be run again or not: once is enough."""
    path, root = recipe(**MINIMAL), tmp_path / "studies"
    _, first = opened(path, root)
    cell = first.take()
    assert cell is not None
    waiting = [opened(path, root, retry_failed=again)[1] for again in (False, True)]
    first.finish(cell, Outcome("it cannot be done"))
    assert [queue.take() for queue in waiting] == [None, None]
    assert [queue.states[cell.name]["attempts"] for queue in waiting] == [1, 1]
    assert [
        tell.plan_study(path, root=root, execution=tell.Execution(retry_failed=again))["left"]["cells"]
        for again in (False, True)
    ] == [0, 1]
    _, again = opened(path, root, retry_failed=True)
    assert again.take() == cell and again.states[cell.name]["attempts"] == 2
    again.give_back()


def measured(study, cell) -> None:
    """A cell's folder as a run leaves it."""
    folder = study.root.cell(cell.name)
    folder.root.mkdir(parents=True)
    write_json(folder.metrics, {"task": {"primary": "m"}, "arms": {}, "train": {"arms": {}}})
    folder.set_status("done", seconds=1.0)


def test_what_another_process_has_ended_is_known_at_once(recipe, tmp_path):
    """The same command in two terminals: the one that is stopped must not write the other's cells back to waiting."""
    path, root = recipe(), tmp_path / "studies"
    study, one = opened(path, root)
    _, two = opened(path, root)
    held = two.take()
    ended = [one.take() for _ in range(2)]
    one.finish(ended[0], Outcome("it cannot be done"))
    measured(study, ended[1])
    one.finish(ended[1], Outcome())
    assert two.counts() == {"failed": 1, "done": 1, "running": 1, "waiting": 1}
    two.give_back()
    states = {name: cell["state"] for name, cell in study.folder.read()["cells"].items()}
    assert [states[cell.name] for cell in (*ended, held)] == ["failed", "done", "waiting"]


def test_a_failed_cell_that_another_process_has_run_again_is_not_failed_any_more(recipe, tmp_path):
    path, root = recipe(**MINIMAL), tmp_path / "studies"
    study, one = opened(path, root)
    one.finish(cell := one.take(), Outcome("it cannot be done"))
    _, two = opened(path, root, retry_failed=True)
    assert two.take() == cell
    measured(study, cell)
    two.finish(cell, Outcome())
    one.write()
    assert study.folder.read()["cells"][cell.name]["state"] == "done" and not study.folder.failed()


def test_the_time_left_is_that_of_the_cells_left(recipe, tmp_path, monkeypatch):
    study, queue = opened(recipe(), tmp_path / "studies")
    now = [0.0]
    monkeypatch.setattr("tell.studies.queue.time.monotonic", lambda: now[0])
    queue.start()
    queue.predicted = {cell.name: 5.0 for cell in study.cells}
    shown = []
    queue.advance = lambda amount=1, info="", left=None: shown.append(left)
    for _ in study.cells:
        cell = queue.take()
        now[0] += 10.0
        queue.finish(cell, Outcome("it cannot be done"))
    left = [text.rpartition("; about ")[2] for text in queue.display.notes if "/4 " in text]
    assert left[:3] == ["30 s left", "20 s left", "10 s left"] and "left" not in left[3]
    assert shown == [30.0, 20.0, 10.0, None]


def test_two_recipes_of_one_name_keep_apart(recipe, tmp_path):
    """The second would take the place of the first one's page; a recipe that is edited is another matter."""
    root = tmp_path / "studies"
    path = recipe(**MINIMAL)
    folder = tell.run_study(path, root=root)
    before = folder.page.read_bytes()
    (tmp_path / "paper").mkdir()
    other = tmp_path / "paper" / path.name
    shutil.copy(recipe("edited", **MINIMAL | {"grid": {"task.rows": [5]}}), other)
    with pytest.raises(TellError, match=r"contains the study of .*small.yaml.*--out"):
        tell.run_study(other, root=root)
    assert folder.page.read_bytes() == before
    shutil.copy(path, other)  # the same runs from another clone
    tell.run_study(other, root=root)
    recipe(**MINIMAL | {"title": "Edited"})
    assert "Edited" in tell.run_study(path, root=root).page.read_text(encoding="utf-8")


def test_packages_are_missed_before_anything_is_run(recipe, tmp_path, monkeypatch):
    asked = {
        "figures": [{"x": "general.rows", "y": "answer_loss"}],
        "fits": [{"x": "general.rows", "y": "answer_loss"}],
    }
    for name in ("matplotlib", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TellError, match=r"needs matplotlib and scipy.*tell-llm\[study\]"):
        tell.run_study(recipe(**asked), root=tmp_path / "studies")
    assert not (tmp_path / "studies/cells").exists()


def test_a_fault_within_a_cell_is_noted_with_its_trace(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("tell.run.tune.tune", lambda *_, **__: {}["no such key"])
    folder = tell.run_study(recipe(**MINIMAL), root=tmp_path / "studies")
    (name, error), *_ = folder.failed().items()
    assert error == "KeyError: 'no such key'"
    record = read(tmp_path / "studies/cells" / f"{name}.json")
    assert "Traceback" in record["trace"] and "run_cell.py" in record["trace"]


def test_a_cell_without_its_adapter_says_how_to_keep_it(recipe, tmp_path):
    folder = tell.run_study(recipe(**MINIMAL | {"arms": ["sft"]}), root=tmp_path / "studies")
    (name,) = folder.read()["cells"]
    with pytest.raises(TellError, match=r"has no adapter left.*--keep-adapters"):
        tell.evaluate(tmp_path / "studies/cells" / name)
    shutil.rmtree(tmp_path / "studies/cells" / name)  # as it says
    tell.run_study(
        recipe(**MINIMAL | {"arms": ["sft"]}), root=tmp_path / "studies", execution=tell.Execution(keep_adapters=True)
    )
    assert tell.evaluate(tmp_path / "studies/cells" / name)["arms"]["sft"]


def test_what_every_cell_would_say_is_said_at_once(recipe, tmp_path):
    """A missing file, a scorer that is not there: no cell is tried."""
    root = tmp_path / "studies"
    with pytest.raises(TellError, match=r"no cell can be run: .*no-such-file.jsonl"):
        tell.run_study(recipe(config={"task": {"data": str(tmp_path / "no-such-file.jsonl")}}), root=root)
    with pytest.raises(TellError, match=r"scorer nowhere_at_all:f: module nowhere_at_all is not found"):
        tell.run_study(recipe(config={"task": {"scorer": "nowhere_at_all:f"}}), root=root)
    assert not list(root.glob("cells/*-*"))


def test_files_of_others_are_left_alone(recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/index.html").write_text("my page", encoding="utf-8")
    with pytest.raises(TellError, match=r"mine: has index.html, which no study wrote.*--out"):
        tell.run_study(recipe(**MINIMAL), root=tmp_path / "studies", out=tmp_path / "mine")
    assert (tmp_path / "mine/index.html").read_text(encoding="utf-8") == "my page"
