"""The README's commands are what the tool and CI really take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tell.cli.main import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [line.strip() for line in README.splitlines() if line.startswith("    ")]
VERBS = sorted({match for line in BLOCKS for match in re.findall(r"\btell ([a-z]+)\b", line)})


def test_the_first_two_commands_install_and_run() -> None:
    assert BLOCKS[0] == "pip install -c constraints.txt . && tell demo"
    assert BLOCKS[1] == 'pip install -c constraints.txt ".[test]" && pytest'


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, test = BLOCKS[1].split(" && ")
    assert install.removeprefix("pip install ") in script.replace("pip install -q ", "")
    assert re.search(rf"&& {test}\b", script)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_in_the_readme_exists(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert verb in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in BLOCKS if re.search(r"(^|&& )tell ", line)])
def test_every_flag_in_the_readme_exists(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line[line.index("tell ") :], comments=True)
    run([words[1], "--help"])
    known = capsys.readouterr().out
    for flag in (word for word in words if word.startswith("--")):
        assert flag in known, f"{flag} of `{line}`"


def test_constraints_pin_torch_and_pyproject_keeps_a_range() -> None:
    assert re.search(r"^torch==\d", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert '"torch>=' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_links_in_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
