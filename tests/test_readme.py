"""The README is short, and its commands are what the tool and CI take. Its flags and links: tests/docs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from doc_pages import blocks
from tell.cli.main import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALL = 'pip install -c constraints.txt ".[all]"'
TEST = 'pip install -c constraints.txt ".[test]" && pytest -n logical --dist loadfile'
VERBS = sorted(set(re.findall(r"`tell ([a-z]+)", README)))


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 130


def test_it_begins_with_two_commands() -> None:
    bash = [block.text for block in blocks(ROOT / "README.md") if block.language == "bash"]
    assert bash[0] == f"{INSTALL}\ntell demo\n"
    assert bash[-1] == f"{TEST}\n"


def test_ci_runs_its_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, test = TEST.split(" && ")
    assert install.removeprefix("pip install ") in script.replace("pip install -q ", "")
    assert re.search(rf"&& {test}\b", script)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_exists(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert verb in capsys.readouterr().out


def test_every_verb_is_named() -> None:
    from typer.main import get_command

    from tell.cli.main import app

    assert {*get_command(app).commands} - {"demo"} <= set(VERBS)  # type: ignore[attr-defined]


def test_constraints_pin_torch_and_pyproject_keeps_a_range() -> None:
    assert re.search(r"^torch==\d", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert any(line.startswith("torch>=") for line in PROJECT["dependencies"])


def test_its_extras_are_those_of_the_project() -> None:
    part = README.partition("Extras: ")[2].partition("`constraints.txt`")[0]
    assert {*re.findall(r"`([a-z]+)`", part)} == {*PROJECT["optional-dependencies"]} - {"test"}


def test_the_tour_is_of_seven_files() -> None:
    tour = re.findall(r"\]\((src/[^)]+\.py)\)", README)
    assert len(tour) == len(set(tour)) == 7 and all((ROOT / path).exists() for path in tour)
