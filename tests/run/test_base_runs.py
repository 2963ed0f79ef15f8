"""Runs over quantised base weights: refused on a CPU before anything is written; behind the refusal, a whole run."""

from __future__ import annotations

import pytest

import tell
from run.runs import config_of, read
from tell.cli.main import run as run_command
from tell.config import load_config, make_config
from tell.errors import TellError
from tell.exports import check_export
from tell.models import load
from tell.run import task as task_module
from tell.run import tune as tune_module
from tell.run.claim import claim
from tell.run.costs import speed_name
from tell.run.session import check_engine
from tell.run.task import load_task
from tell.studies.cells import make_cell


def made(model, out=None, *, device="cpu", **keys):
    """A small run over a base in a format."""
    config = config_of(model, out)
    return config.model_copy(
        update={"model": make_config({"model": {"name": str(model), "device": device, **keys}}).model}
    )


@pytest.fixture
def behind(monkeypatch):
    """No refusal, and the CPU in the GPU's place."""
    monkeypatch.setattr(load, "check_base", lambda *a, **k: None)
    for module in (task_module, tune_module, check_export):
        monkeypatch.setattr(module, "check_planned_model", lambda *a, **k: None)
    monkeypatch.setattr(load, "placed", lambda device: {"device_map": {"": str(device)}})


def test_refused_on_a_cpu_before_anything_is_written(tiny_model, tmp_path, capsys):
    config = made(tiny_model("llama"), tmp_path / "out", base="nf4")
    for start in (tell.tune, tell.plan):
        with pytest.raises(TellError, match=r"model\.base=nf4: .*on cpu"):
            start(config)
    (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert run_command(["tune", "-c", str(tmp_path / "run.yaml")]) == 2
    assert "model.base=full" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_plan_for_a_gpu_counts_quantised_weights(tiny_model):
    configs = [made(tiny_model("llama"), device="cuda", base=base) for base in ("full", "nf4")]
    plans = [tell.plan(config) for config in configs]
    assert [plan["model"].get("base") for plan in plans] == [None, "nf4"]
    tasks = list(map(load_task, configs))
    assert speed_name(tasks[0]) == tasks[0].files.fingerprint and speed_name(tasks[1]).endswith(" nf4")


def test_names_of_cells_change_only_where_the_base_does(tiny_model):
    names = [
        make_cell(made(tiny_model("llama"), **more), "tell").name
        for more in ({}, {"base": "full"}, {"base": "nf4"}, {"base": "int8"}, {"dtype": "bf16"}, {"base": "bf16"})
    ]
    assert names[0] == names[1] and names[4] == names[5] and len(set(names)) == 4


def test_vllm_is_refused_over_a_quantised_base():
    config = load_config(flags={"model": {"base": "nf4"}, "generate": {"engine": "vllm"}})
    with pytest.raises(TellError, match=r"whole weights.*nf4"):
        check_engine(config, decides=False, constrains=False)


def test_a_run_over_four_bits(behind, tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    config = made(tiny_model("llama"), out, base="nf4", dtype="fp32")
    shown = []

    class Shown(tell.progress.Silent):
        def note(self, text):
            shown.append(text)

    folder = tell.tune(config, display=Shown())
    found = read(folder.findings)["machine"]
    assert "base in nf4" in found["dtype_reason"] and "quantised" in found["dtype_reason"]
    assert any("base in nf4" in text for text in shown)
    assert "adapter: beside the weights while answering" in shown
    computed = read(folder.findings)["computed"]
    assert (
        "transformers' layers (this machine has no kernels for the model with quantised weights)"
        in computed["decoding"]
    )
    assert computed["adapter"] == "beside the weights while answering"
    assert read(folder.plan)["model"]["base"] == "nf4"
    assert "base in nf4" in folder.report.read_text(encoding="utf-8")
    with pytest.raises(TellError, match=r"the run was made with model\.base"):
        claim(
            config.model_copy(update={"model": config.model.model_copy(update={"base": "int8"})}),
            resume=True,
            overwrite=False,
        )
    exported = tell.export(folder.root, "hf", out=tmp_path / "hf")
    assert any("trained and scored over base weights in nf4" in text for text in exported["notices"])
    assert read(folder.adapter_of("tell").config)["base_model_name_or_path"] == str(load_task(config).files.path)
    metrics, again = read(folder.metrics), tell.evaluate(folder.root, arms=["tell"])
    primary = metrics["task"]["primary"]
    assert again["arms"]["tell"][primary] == metrics["arms"]["tell"][primary]
