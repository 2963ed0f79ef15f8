"""The pinned versions are within the ranges of pyproject.toml, and vLLM's set agrees with what vLLM itself wants."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VLLM = {"vllm": ">=0.33,<0.34", "torch": "==2.14.0", "transformers": ">=5.16.1,<5.21", "llguidance": ">=1.7,<1.8"}


def pins(name: str) -> dict[str, str]:
    """Version by package of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({canonicalize_name(pin.name) for pin in found}) == len(found), "a package is pinned twice"
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in found}


def wanted(extras: set[str]) -> list[Requirement]:
    """Requirements of TELL with some extras."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        found += [Requirement(text) for text in PROJECT["optional-dependencies"][extra]]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


EXTRAS = set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("name, extras", [("constraints.txt", EXTRAS - {"vllm"}), ("constraints-vllm.txt", {"vllm"})])
def test_pins_are_within_the_ranges(name, extras):
    versions = pins(name)
    for requirement in wanted(extras):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), f"{name}: {requirement}, pinned {version}"


def test_vllm_gets_what_it_wants():
    versions = pins("constraints-vllm.txt")
    for package, allowed in VLLM.items():
        assert Requirement(f"{package}{allowed}").specifier.contains(versions[package]), package
    assert {requirement.name for requirement in wanted({"vllm"})} <= versions.keys() | {"markupsafe", "jinja2"}


def test_the_command_is_documented():
    text = (ROOT / "docs" / "howto" / "gpu.md").read_text(encoding="utf-8")
    assert re.search(r'^pip install -c constraints-vllm\.txt "\.\[vllm\]"', text, re.M)
