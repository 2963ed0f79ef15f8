"""What cannot work is said before a folder is made: broken general data, prompts and rows beyond the positions."""

from __future__ import annotations

import json

import pytest

import tell
from run.runs import config_of
from tell.errors import TellError
from tell.models.find import find_model
from tell.run.task import load_task


def positions_of(model) -> int:
    positions = find_model(str(model)).architecture.max_positions
    assert positions
    return positions


def test_broken_general_data_leaves_nothing(tiny_model, tmp_path):
    general = tmp_path / "general.jsonl"
    general.write_text('{"instruction": "Say hi.", "output": "Hi."}\n{"instruction": \n', encoding="utf-8")
    with pytest.raises(TellError, match=r"general\.jsonl:2"):
        tell.tune(config_of(tiny_model("llama"), tmp_path / "run", general={"source": str(general)}))
    assert not (tmp_path / "run").exists()


def test_a_test_prompt_beyond_the_positions_is_refused_before_training(tiny_model, tmp_path):
    model = tiny_model("llama")
    test = tmp_path / "test.jsonl"
    long = {"prompt": "fox dog " * positions_of(model), "completion": "{}"}
    test.write_text("".join(json.dumps(row) + "\n" for row in ({**long, "prompt": "fox"}, long)), encoding="utf-8")
    with pytest.raises(TellError, match=r"test\.jsonl:2: the prompt has"):
        tell.tune(config_of(model, tmp_path / "run", task={"test": str(test), "test_rows": None}))
    assert not (tmp_path / "run").exists()


def test_no_row_is_longer_than_the_positions(tiny_model):
    model = tiny_model("llama")
    config = config_of(model, train={"max_length": 10 * positions_of(model)})
    assert load_task(config).rules.max_length == positions_of(model)
    assert load_task(config_of(model, train={"max_length": 64})).rules.max_length == 64
