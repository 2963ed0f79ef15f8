"""The check that prints the paired difference of two points."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from studies.made import make_study
from tell.number_text import show
from tell.studies.results import read_results
from tell.studies.stats.seed_means import Bootstrap

SCRIPT = Path(__file__).parents[2] / "recipes/checks/difference.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_study(tmp_path_factory.mktemp("made"))


def ask(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, timeout=120)


def test_it_prints_what_the_study_has(folder):
    done = ask(str(folder), "schema_adherence", "tell general.tokens=1000000", "sft")
    study = read_results(folder)
    a, b = (
        [o for o in study.outcomes if o.arm == arm and o.point["general.tokens"] == 1_000_000]
        for arm in ("tell", "sft")
    )
    gap = Bootstrap(study).difference(a, b, "schema_adherence")
    means = [np.mean([o.measured.metrics["schema_adherence"].value for o in side]) for side in (a, b)]
    assert gap["value"] == pytest.approx(means[0] - means[1], abs=1e-6) and gap["value"] != 0
    assert f"{show(gap['value'], 'points', sign=True)} [" in done.stdout and "seeds: 3" in done.stdout
    assert done.stdout.index("TELL, 15 task rows") < done.stdout.index("SFT, one epoch")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("schema_adherence", "tell", "sft"), "names several points. Its keys are task.rows, general.tokens"),
        (("schema_adherence", "tell general.tokens=7", "sft"), "names nothing"),
        (("chrf", "base", "sft"), "chrf: was not measured on both"),
        (("schema_adherence", "tell foo", "sft"), "'foo' is no key of its grid. Write task.rows=VALUE"),
        (("schema_adherence", "tell 'task.rows=not set'", "sft"), "names nothing"),
        (("schema_adherence", "", "sft"), "'': names nothing"),
    ],
)
def test_what_it_refuses(folder, argv, message):
    done = ask(str(folder), *argv)
    assert done.returncode == 2 and message in done.stderr


def test_numbers_as_the_table_has_them(folder):
    plain, shown = (
        ask(str(folder), "schema_adherence", f"tell general.tokens={n}", "sft").stdout for n in ("1000000", "1,000,000")
    )
    assert plain == shown != ""
