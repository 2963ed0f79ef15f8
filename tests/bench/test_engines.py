"""Engines in this process, spoken to by a script: what they count as work."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.rows import Prompts, Rows, make_prompts, make_rows, plain_tokens
from safetensors import safe_open


class Script:
    """The driver's end of a channel, written down beforehand."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages, self.answers = list(messages), []

    def receive(self) -> dict[str, Any]:
        return self.messages.pop(0) if self.messages else {"do": "stop"}

    def send(self, **answer: Any) -> None:
        self.answers.append(json.loads(json.dumps(answer)))  # a pipe carries JSON


def serve(engine: str, spec: dict[str, Any], *messages: dict[str, Any]) -> list[dict[str, Any]]:
    script = Script(*messages)
    importlib.import_module(f"bench.engines.{engine}").run(script, spec)
    assert not script.messages
    return script.answers


@pytest.fixture
def spec(tiny_model, tmp_path):
    model = tiny_model("llama")
    rows, prompts = make_rows(12, plain_tokens(model), 0, 0.1), make_prompts(6, plain_tokens(model), 0, 0.1)
    rows.save(tmp_path / "rows.npz")
    prompts.save(tmp_path / "prompts.json")
    numbers = {"seed": 0, "batch": 4, "rank": 2, "alpha": 4, "learning_rate": 1e-4, "ceiling_seconds": 0.0}
    files = {"model": str(model), "rows": str(tmp_path / "rows.npz"), "prompts": str(tmp_path / "prompts.json")}
    return {**files, **numbers, "device": "cpu", "dtype": "float32", "dtype_name": "fp32"}


def layers(spec: dict[str, Any]) -> list[tuple[int, int]]:
    """Shapes of the linear layers in the blocks, as they lie in the file."""
    with safe_open(Path(spec["model"]) / "model.safetensors", "np") as file:
        names = [name for name in file.keys() if ".layers." in name]  # noqa: SIM118  (it is no dict)
        shapes = [file.get_slice(name).get_shape() for name in names]
    return [tuple(shape) for shape in shapes if len(shape) == 2]


PEER = {"micro": 4, "order": "step", "attention": "eager", "autocast": False, "padding_free": False}


@pytest.mark.parametrize(
    ("engine", "setting"),
    [
        ("train_transformers", PEER),  # pads
        ("train_transformers", {**PEER, "padding_free": True, "attention": "sdpa"}),
        ("train_tell", {}),
        ("train_tell", {"fast": "off"}),  # pads
    ],
)
def test_the_real_tokens_of_each_turns_rows_are_counted(spec, engine, setting):
    order = np.random.default_rng(0).permutation(12)
    lengths = Rows.load(spec["rows"]).lengths[order]
    assert len(set(lengths[:4].tolist())) > 1
    build = {"do": "build", "setting": setting, "order": order.tolist()}
    built, *turns = serve(engine, spec, build, {"do": "turn", "steps": 1}, {"do": "turn", "steps": 2})
    assert built["built"] and built["versions"]["torch"]
    assert [turn["tokens"] for turn in turns] == [lengths[:4].sum(), lengths[4:].sum()]
    adapters = spec["rank"] * sum(sum(shape) for shape in layers(spec))
    assert all(turn["seconds"] > 0 and turn["trainable_parameters"] == adapters for turn in turns)


def test_a_build_that_is_stopped_makes_room_for_the_next(spec):
    build = {"do": "build", "setting": {}, "order": list(range(12))}
    turn, stop = {"do": "turn", "steps": 1}, {"do": "stop"}
    first, counted, second, again = serve("train_tell", spec, build, turn, stop, build, turn, stop)
    assert first == second and counted["tokens"] == again["tokens"]


@pytest.mark.parametrize(
    ("engine", "setting"),
    [("decode_tell", {"batch": 4}), ("decode_transformers", {"batch": 4, "cache": "dynamic"})],
)
def test_every_answer_has_its_own_length(spec, engine, setting):
    limits = Prompts.load(spec["prompts"]).limits
    assert len(set(limits)) > 1
    for answer, n in zip(
        serve(engine, spec, *({"do": "turn", "setting": setting, "prompts": n} for n in (6, 3))), (6, 3), strict=True
    ):
        assert [len(ids) for ids in answer["answers"]] == limits[:n]


def test_a_forecast_answers_nothing(spec):
    setting = {"batch": 4, "cache": "dynamic"}
    (answer,) = serve("decode_transformers", spec, {"do": "try", "setting": setting, "prompts": 6})
    assert answer["seconds"] > 0 and "answers" not in answer


def test_the_ceiling_is_of_all_linear_layers_but_the_last(spec):
    blocks = sum(rows * columns for rows, columns in layers(spec))
    (answer,) = serve("ceiling", spec, {"do": "turn"})
    assert answer["linear_parameters"] == blocks
    config = json.loads((Path(spec["model"]) / "config.json").read_text())
    assert answer["output_parameters"] == config["vocab_size"] * config["hidden_size"]
    assert answer["gflops"] * answer["seconds"] * 1e9 == pytest.approx(2 * answer["rows"] * blocks)


def test_padding_carries_neither_mask_nor_loss():
    from bench.engines.train_transformers import pad

    batch = pad([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert np.array_equal(batch["attention_mask"], [[1, 1, 1], [1, 0, 0]])
