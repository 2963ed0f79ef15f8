"""config.json of a model, checked before anybody reads a value of it."""

from __future__ import annotations

import json
import shutil

import pytest

from tell.errors import TellError
from tell.models.find import find_model

BAD = [
    {"architectures": 5},
    {"architectures": [5]},
    {"model_type": ["llama"]},
    {"hidden_size": "64"},
    {"hidden_size": 0},
    {"num_attention_heads": -4},
    {"num_attention_heads": True},
    {"vocab_size": 1e30},
    {"num_hidden_layers": 10**30},
    {"max_position_embeddings": "long"},
    {"quantization_config": 4},
    {"auto_map": "x"},
    {"text_config": "x"},
    {"text_config": {"hidden_size": {}}},
    {"rope_scaling": "linear"},
    {"tie_word_embeddings": "yes"},
]


def changed(source, folder, **keys):
    copy = shutil.copytree(source, folder)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return copy


@pytest.mark.parametrize("keys", BAD, ids=str)
def test_values_of_a_wrong_type_are_named(keys, tiny_model, tmp_path):
    folder = changed(tiny_model("llama"), tmp_path / "m", **keys)
    with pytest.raises(TellError, match=next(iter(keys))):
        find_model(str(folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"a": ', "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a Git LFS pointer"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_files_that_are_cut_short(content, said, tiny_model, tmp_path):
    folder = changed(tiny_model("llama"), tmp_path / "m")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(TellError, match=rf"config.json: .*{said}"):
        find_model(str(folder))


@pytest.mark.parametrize("weights", [5, None, {"a": 5}, {"a": ["x"]}, {"a": "../other/model.safetensors"}])
def test_an_index_that_is_none(weights, tiny_model, tmp_path):
    folder = changed(tiny_model("llama"), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(TellError, match="not an index of safetensors"):
        find_model(str(folder))


def test_what_transformers_makes_of_other_values_is_one_line(tiny_model, tmp_path):
    from tell.models.load import load_model

    for keys in ({"hidden_act": 5}, {"num_attention_heads": 3}, {"rope_parameters": {"rope_type": "no such"}}):
        folder = changed(tiny_model("llama"), tmp_path / str(keys)[:12].strip("{'"), **keys)
        with pytest.raises(TellError, match="cannot be loaded"):
            load_model(find_model(str(folder)), dtype="fp32", device="cpu")
