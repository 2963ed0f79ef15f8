"""A run on a workbook, from its columns to eval, which reads the rows as the run did."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

import tell
from run.runs import config_of, read
from tell.cli.main import run as command
from tell.errors import TellError
from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.progress import Silent
from tell.report.notices import run_notices
from tell.run.claim import read_run_config
from tell.run.task import load_task
from tell.studies.cells import contents, inputs
from tell.verbs.add_rows import read_addition
from tell.verbs.open_run import open_run
from workbooks import xlsx

CATEGORIES = ("billing", "access", "bug")
HEAD = ["Id", "Subject", "Body", "Category", "Zip", "Paid"]


def rows(n: int, seed: int) -> list[list[object]]:
    draw = random.Random(seed)
    made: list[list[object]] = []
    for i in range(n):
        category = draw.choice(CATEGORIES)
        body = f"My question number {i * 31 + seed} about {category} is still not answered by anybody of you."
        made.append([i, f"Ticket {i}", body, category, f"{draw.choice((1067, 10115)):05}", draw.random() < 0.5])
    return made


def book(path: Path) -> Path:
    return xlsx(
        path,
        [HEAD, *rows(40, 1)],
        sheet="Train",
        Test=[HEAD, *rows(8, 2)],
        More=[HEAD[:3], *([*r[:3]] for r in rows(6, 3))],
    )


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """(folder, workbook) of a run on three sheets of one workbook, with raw texts as general data."""
    root = tmp_path_factory.mktemp("sheets")
    path = book(root / "tickets.xlsx")
    texts = [
        {"text": f"The {word} fox jumps over the lazy dog, and the dog does not mind at all."} for word in "abcdefgh"
    ]
    (root / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    task = {"data": f"{path}#Train", "test": f"{path}#Test", "unlabelled": f"{path}#More", "schema": None}
    task |= {"prompt": "Subject: {Subject}\n\n{Body}", "answer": "Category,Zip,Paid", "rows": None, "test_rows": None}
    config = config_of(
        tiny_model("llama"), root / "run", task=task, general={"source": str(root / "texts.jsonl"), "rows": 4}
    )
    return tell.tune(config).root, path


def test_the_run_is_of_the_columns(finished):
    folder, path = finished
    found = read(folder / "findings.json")
    assert found["data"]["path"] == f"{path}#Train" and found["test"]["path"] == f"{path}#Test"
    assert found["data"]["columns"] == {"prompt": "Subject: {Subject}\n\n{Body}", "answer": "Category, Zip, Paid"}
    assert found["data"]["form"]["types"] == ["text", "text", "boolean"]
    assert found["general"]["layout"] == "text"
    assert any("raw texts" in text for text in found["notices"])
    assert any("sheet 'Train' is read; the others are 'Test', 'More'" in text for text in found["notices"])
    assert not any(text.startswith("guessed from the data") for text in run_notices(found, {}))
    first = read_jsonl(folder / "predictions/tell.jsonl")[0]
    assert list(json.loads(first["reference"])) == ["Category", "Zip", "Paid"]
    assert json.loads(first["reference"])["Zip"].startswith("0") or json.loads(first["reference"])["Zip"] == "10115"
    assert first["prompt"].startswith("Subject: Ticket ")


def test_eval_reads_the_rows_as_the_run_did(finished, tmp_path):
    """Zip codes of a test file that has none with a zero in front are text all the same."""
    folder, _ = finished
    assert tell.evaluate(folder) == json.loads(json.dumps(read(folder / "metrics.json")))
    other = tmp_path / "more.csv"
    other.write_text("Subject,Body,Category,Zip,Paid\nTicket,Help me,bug,10115,TRUE\nTicket,Help us,bug,10115,no\n")
    tell.evaluate(folder, test=str(other), arms=["tell"])
    assert [json.loads(row["reference"]) for row in read_jsonl(folder / "predictions/eval/tell.jsonl")] == [
        {"Category": "bug", "Zip": "10115", "Paid": True},
        {"Category": "bug", "Zip": "10115", "Paid": "no"},
    ]


def test_added_rows_keep_the_unlabelled_prompts(finished, tmp_path):
    """The grown rows have other columns than the workbook, whose prompts are made of two."""
    folder, _ = finished
    more = xlsx(tmp_path / "more.xlsx", [HEAD, *rows(4, 9)])
    addition = read_addition(open_run(folder), more, Silent())
    prompts = [example.prompt for example in load_task(read_run_config(RunFolder(folder))).unlabelled.examples]
    grown = addition.write(RunFolder(tmp_path / "new"))
    assert [example.prompt for example in load_task(grown).unlabelled.examples] == prompts
    assert len(prompts) == 6 and "Subject: Ticket 0" in prompts[0][0].content
    assert Path(grown.task.unlabelled).parent == tmp_path / "new" / "rows"


def test_a_damaged_record_of_the_columns_is_refused(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    found = read(folder / "findings.json")
    found["data"]["form"]["types"] = ["text"]
    (tmp_path / "run/findings.json").write_text(json.dumps(found))
    with pytest.raises(TellError, match=r"findings.json: is damaged \(data.form: .*types of another number of columns"):
        _ = open_run(tmp_path / "run").read_by


def test_a_guess_is_kept_for_eval(tiny_model, tmp_path):
    """The whole workbook decides what prompt and answer are; a further file of two rows would not."""
    table = [[row[0], row[2], row[3]] for row in rows(30, 1)]
    path = xlsx(tmp_path / "a.xlsx", [["Id", "Body", "Category"], *table])
    task = {"data": str(path), "test": None, "schema": None, "rows": None}
    folder = tell.tune(config_of(tiny_model("llama"), tmp_path / "run", task=task, general={"source": "none"})).root
    notices = read(folder / "findings.json")["notices"]
    assert 'a.xlsx: guessed from the shape of the columns: --prompt "{Body}" --answer Category' in notices
    assert read(folder / "findings.json")["kind"]["name"] == "label"
    (tmp_path / "b.csv").write_text("Body,Category\nHelp me,bug\nHelp us,bug\n")
    assert tell.evaluate(folder, test=str(tmp_path / "b.csv"), arms=["tell"])["arms"]["tell"]
    assert tell.evaluate(folder)["arms"] == read(folder / "metrics.json")["arms"]


def test_inputs_of_a_study_are_sheets(tiny_model, tmp_path):
    path = book(tmp_path / "a.xlsx")
    task = {"data": f"{path}#Train", "test": f"{path}#Test", "schema": None, "answer": ["Category"]}
    config = config_of(tiny_model("llama"), task=task)
    assert inputs(config)["task", "data"] == path
    content = contents(config)
    assert content["task", "data"].endswith("#Train") and content["task", "test"].endswith("#Test")


def test_the_flags_of_the_command_line(tiny_model, tmp_path, capsys):
    path = book(tmp_path / "a.xlsx")
    flags = ["--model", str(tiny_model("llama")), "--general", "none", "--anchor", "none", "--json"]
    typed = ["--prompt", r"Subject: {Subject}\n\n{Body}", "--answer", "Category,Paid"]
    assert command(["plan", f"{path}#Train", *typed, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["task"]["kind"] == "json"
    for wrong, what in (
        (["--prompt", "{Bodi}", "--answer", "Category"], "--prompt: there is no column 'Bodi'"),
        (["--columns", "prompt=Body,answer=Category", "--answer", "Paid"], "--columns and --answer"),
    ):
        assert command(["plan", f"{path}#Train", *wrong, *flags]) == 2
        assert what in capsys.readouterr().err
