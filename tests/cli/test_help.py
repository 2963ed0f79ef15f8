"""Help, versions and unknown names, as a user meets them: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tell import __version__
from tell.cli.main import run

VERBS = (
    *("tune", "plan", "look", "eval", "chat", "export", "serve", "ui", "report", "gate", "add", "general"),
    *("anchor", "separate", "build", "study", "demo"),
)
HEAVY = ("torch", "transformers", "datasets", "peft", "pydantic", "numpy", "rich")


def tell(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tell", *argv],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "100", **env},
        timeout=120,
    )


def loaded_after(*argv: str) -> tuple[int, set[str]]:
    """Exit code of a command line, and the heavy packages it imported."""
    code = (
        "import sys; from tell.cli.main import run; code = run(sys.argv[1:]); "
        f"print('loaded', code, *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120).stdout
    _, exit_code, *names = out.splitlines()[-1].split()
    return int(exit_code), set(names)


def test_help_lists_every_verb():
    result = tell("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    commands = result.stdout.split("Commands:")[1]
    listed = [line.split()[0] for line in commands.splitlines() if line.strip()]
    assert tuple(sorted(listed)) == tuple(sorted(VERBS))
    assert "..." not in commands  # no help text is cut short


def test_no_verb_shows_help():
    assert tell().stdout == tell("--help").stdout


def test_help_imports_nothing_heavy():
    assert loaded_after("--help") == (0, set())


@pytest.mark.parametrize(
    "argv",
    [
        ("tune", "--genral", "self"),
        ("tune", "rows.jsonl", "--set", "trian.lora_r=4"),
        ("tune", "rows.jsonl", "--arms", "base,tel"),
        ("tune", "rows.jsonl", "--lr", "fast"),
        ("tune",),
    ],
)
def test_config_errors_import_no_torch(argv):
    code, loaded = loaded_after(*argv)
    assert code == 2
    assert not loaded & {"torch", "transformers", "datasets", "peft"}


def test_version():
    assert tell("--version").stdout.strip() == f"tell {__version__}"


@pytest.mark.parametrize("verb", [*VERBS, "build halu-cot-json", "build is-en-news"])
def test_every_verb_has_help(verb, capsys):
    assert run([*verb.split(), "--help"]) == 0
    assert f"tell {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["tun", "x.jsonl"], ["unknown verb 'tun'", "did you mean tune?"]),
        (["tickets.jsonl"], ["unknown verb 'tickets.jsonl'", "tell tune tickets.jsonl"]),
        (["build", "halu-cot"], ["unknown verb 'halu-cot'", "did you mean halu-cot-json?", "tell build --help"]),
        (["tune", "x", "--general-ration", "3"], ["--general-ration", "did you mean --general-ratio?", "tell tune"]),
        (["plan", "x", "--jsn"], ["unknown flag --jsn", "did you mean --json?", "`tell plan --help`"]),
        (["eval", "run", "--arm", "base"], ["unknown flag --arm", "did you mean --arms?"]),
        (["tune", "x", "--seed"], ["--seed", "tell tune"]),
        (["eval"], ["missing argument", "RUN", "tell eval --help"]),
        (["tune", "x", "y"], ["tell tune", "y"]),
        (["tune", "x", "--seed", "4.5"], ["--seed: '4.5' is not a whole number", "1e4"]),
        (["tune", "x", "--general-tokens", "many"], ["--general-tokens: 'many' is not a number"]),
        (["tune", "x", "--general-tokens", "nan"], ["--general-tokens: 'nan' is not a number"]),
        (["tune", "x", "--arms", "base,tel"], ["--arms: unknown arm 'tel'; did you mean tell?"]),
        (["tune", "x", "--arms", ","], ["--arms: unknown arm ''"]),
        (["tune", "x", "--kind", "jsn"], ["--kind", "did you mean json?"]),
        (["tune", "x", "--preset", "papr"], ["--preset", "did you mean paper?"]),
        (["tune", "x", "--anchor-place", "top"], ["--anchor-place", "Use user or system."]),
        (["tune", "x", "--resume", "--overwrite"], ["--resume and --overwrite", "Give one of them."]),
        (["tune"], ["no task data given", "tell tune tickets.jsonl", "tell demo"]),
        (["plan", "--set", "seed=4"], ["no task data given", "tell plan"]),
        (["chat", "run", "--arm", "tel"], ["--arm: unknown arm 'tel'; did you mean tell?"]),
        (["tune", "x", "--general-ratio=-1"], ["--general-ratio: input should be greater than or equal to 0"]),
        (["tune", "x", "--lr", "0"], ["--lr: input should be greater than 0 (got 0.0)", "Change --lr."]),
        (["tune", "x", "--task-rows", "5", "--task-tokens", "1e4"], ["--task-tokens", "--task-rows", "one of them"]),
        (
            ["tune", "x", "--general-rows", "5", "--general-ratio", "2"],
            ["--general-ratio and --general-rows", "Give one of them."],
        ),
        (["tune", "x", "--set", "seed"], ["--set 'seed' is not of the form a.b=c"]),
        (["tune", "x", "--set", "gneral.ratio=3"], ["--set gneral.ratio=3: unknown key gneral", "mean general?"]),
        (["tune", "x", "--set", "general.raito=3"], ["unknown key general.raito; did you mean general.ratio?"]),
        (["tune", "x", "--set", "train.lora_r=many"], ["train.lora_r", "'many'"]),
        (["tune", "-c", "nowhere.yaml"], ["nowhere.yaml: no such file", "-c"]),
        (
            ["build", "halu-cot-json", "x.json", "--base-url", "http://localhost:1/v1"],
            ["--base-url", "--teacher"],
        ),
        (["build", "halu-cot-json", "nowhere.json"], ["nowhere.json: no such file"]),
    ],
)
def test_mistakes_get_one_line(argv, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err
    assert list(tmp_path.iterdir()) == []


def test_exit_code_of_a_mistake_reaches_the_shell():
    result = tell("tune", "--genral", "self")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("how", ["flag", "variable", "neither"])
def test_a_fault_of_ours_is_reported_as_one(how, capsys, monkeypatch, tmp_path):
    def fault(*_, **__):
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr("tell.plan", fault, raising=False)  # no input is known that makes a fault
    if how == "variable":
        monkeypatch.setenv("TELL_DEBUG", "1")
    assert run(["plan", "x.jsonl", *(["--debug"] if how == "flag" else [])]) == 1
    err = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: by nought" in err and "report it" in err
    assert ("Traceback" in err) == (how != "neither")
    assert ("--debug" in err.splitlines()[-1]) == (how == "neither")


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/full/x"), 2, "/full/x: no space left on device"),
        (PermissionError(13, "Permission denied", "/closed"), 2, "/closed: permission denied"),
        (MemoryError(), 2, "train.micro_tokens"),
    ],
)
def test_what_no_check_foresees_is_still_one_line(error, code, part, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("tell.plan", fail, raising=False)
    assert run(["plan", "x.jsonl"]) == code
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1


def test_errors_carry_no_terminal_sequences(capsys):
    assert run(["\x1b]0;title\x07tune"]) == 2
    assert "\x1b" not in capsys.readouterr().err
