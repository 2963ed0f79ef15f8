"""The real harness over a tiny model: workers, pipes, turns and the shape of its JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from homes import home_with_kernels

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TELL_HOME": str(home), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)


@pytest.fixture(scope="module")
def result(tiny_model, tmp_path_factory):
    home = home_with_kernels(tmp_path_factory.mktemp("home"))
    sizes = "--length-scale 0.05 --batch 4 --turns 2 --steps 1 --prompts 6 --ceiling-seconds 0.1 --plan-rows 300"
    model = str(tiny_model("llama"))
    done = bench("--json", "--peers", "transformers", "--model", model, *sizes.split(), home=home)
    assert done.returncode == 0, done.stderr
    assert "turn 2, transformers" in done.stderr
    return json.loads(done.stdout), home


def test_json_has_the_promised_shape(result):
    out, _ = result
    assert out["ceiling_gflops"] > 0
    for part, names in (("train", {"tell", "transformers"}), ("decode", {"tell", "transformers"})):
        assert names <= set(out[part])
        for engine in out[part].values():
            assert engine["tokens_per_s"] > 0 and engine["peak_rss_mb"] > 100
            low, high = engine["spread"]
            assert low <= engine["tokens_per_s"] <= high
        own = out[part]["tell"]["tokens_per_s"]
        want = own / out[part]["transformers"]["tokens_per_s"]
        assert out[f"{part}_ratio"]["transformers"] == pytest.approx(want, abs=0.006)
    assert 0 < out["train"]["tell"]["ceiling_share"] < 1
    assert set(out["plan"]) == {"cold_s", "warm_s", "rows"} and out["plan"]["rows"] == 300
    assert out["missing"] == {}
    assert out["facts"]["rows_a_step"] == 4 and out["facts"]["versions"]["torch"]


def test_engines_did_the_same_work(result):
    out, _ = result
    train = out["train"]
    assert train["tell"]["trainable_parameters"] == train["transformers"]["trainable_parameters"] > 0
    assert out["decode"]["transformers"]["same_answers_as_tell"] > 0


def test_the_peer_got_the_best_of_its_tries_and_they_are_kept(result):
    out, home = result
    kept = json.loads((home / "bench" / "settings.json").read_text())
    for part in ("train", "decode"):
        peer = out[part]["transformers"]
        speeds = [t["tokens_per_s"] or 0 for t in peer["tries"]]
        assert len(speeds) > 1
        assert peer["tries"][speeds.index(max(speeds))]["setting"] == peer["setting"]
    assert len(kept) == 2


def test_a_table_can_be_drawn(result, capsys):
    from bench.table import show
    from rich.console import Console

    out, _ = result
    show({**out, "missing": {"train": {"trl": "cannot be installed (no [network])"}}}, Console(width=100))
    text = capsys.readouterr().out
    assert "transformers" in text and "GFLOP/s" in text and "300 rows" in text and "no [network]" in text


def test_an_unknown_model_is_one_line(tmp_path, capsys):
    from bench.__main__ import main

    assert main(["--only", "plan", "--model", str(tmp_path / "nothing")]) == 1
    out, err = capsys.readouterr()
    assert not out and len(err.strip().splitlines()) == 1 and "nothing" in err
