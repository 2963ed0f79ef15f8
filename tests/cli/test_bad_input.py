"""Bad input: one line with what, where and remedy, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tell.cli.main import run

SUPPORT = Path(__file__).parents[2] / "examples/support"


def rows(n: int) -> list[dict]:
    return [{"prompt": f"Is {i} even?", "completion": "yes" if i % 2 == 0 else "no"} for i in range(n)]


def jsonl(items: list) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def edited(at: int, change: Callable[[dict], dict]) -> bytes:
    items = rows(20)
    items[at] = change(items[at])
    return jsonl(items)


# name -> (file name, bytes or None, further flags, what the line must hold)
DATA: dict[str, tuple[str, bytes | None, list[str], list[str]]] = {
    "missing file": ("rows.jsonl", None, [], ["rows.jsonl: no such file"]),
    "empty file": ("rows.jsonl", b"", [], ["rows.jsonl: is empty"]),
    "broken JSON": (
        "rows.jsonl",
        jsonl(rows(3)) + b'{"prompt": "a", "completion\n' + jsonl(rows(2)),
        [],
        ["rows.jsonl:4: is not valid JSON"],
    ),
    "wrong encoding": ("rows.jsonl", 'id,text\n1,"é"\n'.encode("utf-16")[:-1], [], ["rows.jsonl", "UTF-16", "UTF-8"]),
    "damaged UTF-8": ("rows.csv", "prompt,completion\ná,é\nb,".encode() + b"\xe9\n", [], ["rows.csv:3", "UTF-8"]),
    "mixed layouts": (
        "rows.jsonl",
        jsonl([*rows(2), {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]),
        [],
        ["rows.jsonl:3"],
    ),
    "a row without an answer": (
        "rows.jsonl",
        edited(6, lambda row: {**row, "completion": ""}),
        [],
        ["rows.jsonl:7"],
    ),
    "an answer that is missing": (
        "rows.jsonl",
        edited(6, lambda row: {"prompt": row["prompt"]}),
        [],
        ["rows.jsonl:7"],
    ),
    "one row in all": ("rows.jsonl", jsonl(rows(1)), [], ["rows.jsonl: has one row in all", "--test"]),
    "an answer longer than the limit": (
        "rows.jsonl",
        edited(6, lambda row: {**row, "completion": "ja " * 900}),
        ["--set", "train.too_long=refuse", "--set", "train.max_length=256", "--set", "task.test_fraction=0.05"],
        ["rows.jsonl:7", "256", "train.max_length"],
    ),
    "all rows longer than the limit": (
        "rows.jsonl",
        jsonl([{**row, "completion": "ja " * 90} for row in rows(20)]),
        ["--set", "train.max_length=32", "--kind", "text"],
        ["rows.jsonl:", "none of the", "train.max_length"],
    ),
    "more rows than there are": (
        "rows.jsonl",
        jsonl(rows(20)),
        ["--task-rows", "500"],
        ["500 rows", "Ask for at most"],
    ),
    "a column that is not there": ("rows.jsonl", jsonl(rows(20)), ["--columns", "prompt=q"], ["--columns", "'q'"]),
    "a test file that is not there": ("rows.jsonl", jsonl(rows(20)), ["--test", "t.jsonl"], ["t.jsonl: no such file"]),
    "an anchor file that is not there": ("rows.jsonl", jsonl(rows(20)), ["--anchor", "@a.txt"], ["@a.txt", "--anchor"]),
    "a schema that is not there": ("rows.jsonl", jsonl(rows(20)), ["--schema", "s.json"], ["s.json: no such file"]),
    "a scorer that is not there": ("rows.jsonl", jsonl(rows(20)), ["--scorer", "no.such:f"], ["no.such"]),
    "an order that is not there": ("rows.jsonl", jsonl(rows(20)), ["--order", "shufle"], ["shufle", "mean shuffle?"]),
    "a general file that is not there": (
        "rows.jsonl",
        jsonl(rows(20)),
        ["--general", "g.jsonl"],
        ["g.jsonl: no such file"],
    ),
    "general rows without general data": (
        "rows.jsonl",
        jsonl(rows(20)),
        ["--general", "none", "--arms", "base,general"],
        ["--arms", "general"],
    ),
}


def refused(argv: list[str], capsys, parts: list[str], folder: Path) -> None:
    """``argv`` fails with one line that holds ``parts``, and leaves ``folder`` as it was."""
    before = sorted(folder.rglob("*"))
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]  # notes of what went well may stand before it
    assert line.startswith("error: ") and err.count("error:") == 1, err
    for part in parts:
        assert part in line, line
    assert sorted(folder.rglob("*")) == before


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory; caches lie elsewhere."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    return work


@pytest.mark.parametrize("case", DATA)
def test_bad_data(case, here, tiny_model, capsys):
    name, content, flags, parts = DATA[case]
    if content is not None:
        (here / name).write_bytes(content)
    argv = ["tune", name, "--model", str(tiny_model("llama")), "--out", "out", "--anchor", "none", "--general", "none"]
    refused([*argv, *flags], capsys, parts, here)


@pytest.mark.parametrize("verb", ["tune", "plan", "anchor"])
def test_schema_that_is_none(verb, here, tiny_model, capsys):
    (here / "schema.json").write_text('{"type": "objekt"}')
    argv = [verb, str(SUPPORT / "train.jsonl"), "--schema", "schema.json", "--model", str(tiny_model("llama"))]
    refused(argv, capsys, ["schema.json: is not a valid JSON Schema", "objekt"], here)


def test_folder_that_is_no_model(here, capsys):
    (here / "model").mkdir()
    (here / "model" / "notes.txt").write_text("nothing here")
    refused(["tune", str(SUPPORT / "train.jsonl"), "--model", "./model", "--out", "out"], capsys, ["model"], here)


def test_model_that_is_not_there(here, capsys):
    argv = ["tune", str(SUPPORT / "train.jsonl"), "--model", "./no/model", "--out", "out"]
    refused(argv, capsys, ["no/model", "Check the path"], here)


def test_pickled_weights(here, tiny_model, capsys):
    import shutil

    shutil.copytree(tiny_model("llama"), here / "model")
    (here / "model" / "model.safetensors").rename(here / "model" / "pytorch_model.bin")
    argv = ["tune", str(SUPPORT / "train.jsonl"), "--model", "./model", "--out", "out"]
    refused(argv, capsys, ["pickle", "save_pretrained"], here)


def test_hub_that_cannot_be_reached(here):
    """In a process of its own: the hub's address is read once, at import."""
    result = subprocess.run(
        [sys.executable, "-m", "tell", "plan", str(SUPPORT / "train.jsonl"), "--model", "someone/some-model", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(here / "hf"), "HF_HUB_OFFLINE": "0"},
        timeout=120,
    )
    assert (result.returncode, result.stdout) == (2, "")
    line = result.stderr.splitlines()[-1]
    assert "someone/some-model" in line and "cannot be reached" in line and "smollm2-135m" in line


def test_output_folder_that_holds_a_run(here, tiny_model, capsys):
    (here / "out").mkdir()
    (here / "out" / "run.yaml").write_text("")
    (here / "out" / "status.json").write_text('{"state": "interrupted"}')
    argv = ["tune", str(SUPPORT / "train.jsonl"), "--model", str(tiny_model("llama")), "--out", "out"]
    refused(argv, capsys, ["out", "interrupted", "--resume", "--overwrite"], here)


@pytest.mark.parametrize("content", ["run.yaml", "thesis.txt"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_output_folder_that_holds_something_else(content, flags, here, tiny_model, capsys):
    (here / "out").mkdir()
    (here / "out" / content).write_text("task: {data: years of work}")
    argv = ["tune", str(SUPPORT / "train.jsonl"), "--model", str(tiny_model("llama")), "--out", "out", *flags]
    refused(argv, capsys, ["out", "no run", "Choose another --out"], here)


def test_output_that_is_a_file(here, tiny_model, capsys):
    (here / "out").write_text("")
    argv = ["tune", str(SUPPORT / "train.jsonl"), "--model", str(tiny_model("llama")), "--out", "out"]
    refused(argv, capsys, ["out", "is a file"], here)


def test_output_that_cannot_be_written(here, tiny_model, capsys):
    """A folder below a file can be made by nobody, not even by root."""
    (here / "file").write_text("")
    argv = ["tune", str(SUPPORT / "train.jsonl"), "--model", str(tiny_model("llama")), "--out", "file/out"]
    refused(argv, capsys, ["file/out", "--out"], here)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(here, tiny_model, capsys):
    (here / "closed").mkdir(mode=0o500)
    argv = ["tune", str(SUPPORT / "train.jsonl"), "--model", str(tiny_model("llama")), "--out", "closed/out"]
    refused(argv, capsys, ["closed", "--out"], here)


@pytest.mark.parametrize("argv", [["eval", "nowhere"], ["chat", "nowhere", "hello"], ["report", "nowhere"]])
def test_run_folder_that_is_not_there(argv, here, capsys):
    refused(argv, capsys, ["nowhere", "tell tune"], here)


@pytest.mark.parametrize("argv", [["eval", "."], ["chat", ".", "hello"], ["report", "."]])
def test_folder_that_holds_no_run(argv, here, capsys):
    refused(argv, capsys, ["tell tune"], here)


@pytest.mark.parametrize("flag", ["-c", "--anchor"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_never_ends_is_not_read(flag, kind, here, capsys):
    os.mkfifo(here / "pipe")
    path = {"pipe": "pipe", "device": "/dev/zero", "folder": "."}[kind]
    argv = ["plan", str(SUPPORT / "train.jsonl"), flag, f"@{path}" if flag == "--anchor" else path]
    refused(argv, capsys, ["is a folder" if kind == "folder" else "a pipe or device"], here)


@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user/x", "a/" * 3000, "con\x1b]0;title\x07"])
@pytest.mark.parametrize("place", ["DATA", "--test", "-c", "--anchor", "--model", "--general", "--schema", "--out"])
def test_names_that_are_no_names(name, place, here, tiny_model, capsys):
    argv = ["tune", str(SUPPORT / "train.jsonl"), "--model", str(tiny_model("llama"))]
    argv += ["--set", "tokens.unit=./none"]  # so that it ends before it starts whatever else is accepted
    if place == "DATA":
        argv[1] = name
    else:
        argv += [place, f"@{name}" if place == "--anchor" else name]
    assert run(argv) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert out == "" and line.startswith("error: ") and len(line) < 2100 and "\x1b" not in err
    assert not list(here.iterdir())


def test_a_run_of_too_many_rows(here, tiny_model, capsys):
    argv = ["plan", str(SUPPORT / "train.jsonl"), "--model", str(tiny_model("llama")), "--anchor", "none"]
    refused([*argv, "--general", "none", "--repeat", "1e7"], capsys, ["mix.repeat", "at most 10,000,000 rows"], here)
    refused([*argv, "--general-tokens", "1e15"], capsys, ["general.tokens", "at most"], here)


def test_plan_refuses_the_scorer_that_tune_refuses(here, tiny_model, capsys):
    argv = [str(SUPPORT / "train.jsonl"), "--model", str(tiny_model("llama")), "--scorer", "no.such:f"]
    for verb in ("plan", "tune"):
        refused([verb, *argv], capsys, ["no.such"], here)


def test_a_tokenizer_that_gives_up(here, monkeypatch, capsys):
    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        raise PanicException("called unwrap on a None value")

    monkeypatch.setattr("tell.plan", panic)
    refused(["plan", str(SUPPORT / "train.jsonl")], capsys, ["the tokenizer crashed", "called unwrap"], here)


def test_a_pipe_that_never_ends_is_no_message(here, monkeypatch, capsys):
    with open("/dev/zero", encoding="utf-8") as zeros:
        monkeypatch.setattr("sys.stdin", zeros)
        refused(["chat", "run"], capsys, ["the message from the pipe", "more than"], here)
    (here / "latin").write_bytes("é".encode("latin-1"))
    with (here / "latin").open(encoding="utf-8") as text:
        monkeypatch.setattr("sys.stdin", text)
        refused(["chat", "run"], capsys, ["the message from the pipe: is not UTF-8"], here)
