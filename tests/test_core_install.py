"""The core installation: JSON and label tasks need no extra, and what needs one says so at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from homes import home_with_kernels

ROOT = Path(__file__).parents[1]
# What only extras bring, as it is imported.
MISSING = (
    *("sacrebleu", "tensorboard", "openai", "matplotlib", "sklearn", "scipy", "lm_eval", "ray"),
    *("sentencepiece", "vllm", "starlette", "uvicorn", "wandb", "mlflow", "trackio"),
)
HIDE = f"""
import sys
class Hidden:  # a finder that finds all but the extras
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *more):
        return None if name.partition(".")[0] in {MISSING!r} else self.finder.find_spec(name, *more)
sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def core(tmp_path):
    """Run `python -m tell` in an installation without extras."""

    home = home_with_kernels(tmp_path / "home")

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        code = f"{HIDE}\nimport runpy\nrunpy.run_module('tell', run_name='__main__', alter_sys=True)"
        env = {**os.environ, "TELL_HOME": str(home)}
        return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=env, timeout=300)

    return run


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ANSWERS = {
    "label": lambda i: "yes" if i % 2 else "no",
    "json": lambda i: json.dumps({"even": i % 2 == 0}),
    "text": lambda i: f"The number {i} is a fine number, as numbers go, and it is followed by {i + 1}.",
}


@pytest.mark.parametrize("kind", ["label", "json"])
def test_a_run_needs_no_extra(kind, core, tiny_model, tmp_path):
    data = write(
        tmp_path / "rows.jsonl", [{"prompt": f"Is {i} even?", "completion": ANSWERS[kind](i)} for i in range(24)]
    )
    small = ("generate.max_new_tokens=4", "eval.forgetting_rows=0", "eval.bootstrap=100", "train.batch_size=8")
    done = core(
        *("tune", data, "--kind", kind, "--model", str(tiny_model("llama")), "--out", str(tmp_path / "run")),
        *("--general-rows", "6", "--general", "builtin", "--anchor", "Is it?", "--arms", "base,tell"),
        *(part for text in small for part in ("--set", text)),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
    assert 'pip install "tell-llm[tensorboard]"' in done.stderr
    assert (tmp_path / "run/logs/tell.jsonl").exists()


def test_a_text_task_is_refused_before_training(core, tiny_model, tmp_path):
    data = write(
        tmp_path / "rows.jsonl", [{"prompt": f"Say {i}.", "completion": ANSWERS["text"](i)} for i in range(24)]
    )
    argv = (data, "--kind", "text", "--model", str(tiny_model("llama")), "--general", "none")
    for verb in (("plan",), ("tune", "--out", str(tmp_path / "run"))):
        done = core(*verb, *argv)
        assert done.returncode == 2 and 'pip install "tell-llm[text]"' in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_teacher_names_its_extra(core, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [])
    done = core("build", "halu-cot-json", rows, "--teacher", "x", "--base-url", "http://localhost:1/v1")
    assert done.returncode == 2 and 'pip install "tell-llm[teacher]"' in done.stderr, done.stderr


def test_the_extra_all_has_every_extra_but_hardware_and_trackers():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = extras["all"]
    included = set(named.removeprefix("tell-llm[").removesuffix("]").split(","))
    trackers = {"wandb", "mlflow", "trackio"}  # of which a user has one, and some bring whole servers
    assert included == set(extras) - {"all", "test", "docs", "gpu", "vllm"} - trackers
    assert "tell-llm[all,wandb,mlflow,trackio]" in extras["test"]
