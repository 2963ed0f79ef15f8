"""Hidden states over packed rows against transformers' own, row by row."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from run.runs import config_of
from tell.errors import TellError
from tell.run.task import load_task
from tell.train.states import hidden_states
from tell.verbs.hidden_states import general_queries, layer_numbers


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_states_are_those_of_transformers(tiny_model, family):
    folder = tiny_model(family)
    plain, packed = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    rng = np.random.default_rng(0)
    head = rng.integers(0, 200, 40).tolist()  # some rows share a prefix, as those with an anchor do
    prompts = [head * (i % 2) + rng.integers(0, 200, n).tolist() for i, n in enumerate((3, 50, 1, 9, 31, 50))]
    layers = list(range(plain.config.num_hidden_layers + 1))
    with torch.no_grad():
        rows = [plain(torch.tensor([p]), output_hidden_states=True).hidden_states for p in prompts]
    for state in ("last", "mean"):
        expected = [[h[k][0, -1] if state == "last" else h[k][0].mean(0) for h in rows] for k in layers]
        expected = np.stack([torch.stack(layer).numpy() for layer in expected])
        for micro_tokens in (64, 3072):
            found = hidden_states(packed, prompts, layers, states=(state,), micro_tokens=micro_tokens)[0]
            assert found.shape == expected.shape and np.abs(found - expected).max() < 2e-5
    some = hidden_states(packed, prompts, [layers[-1], 1])
    assert np.abs(some - hidden_states(packed, prompts, layers)[:, [layers[-1], 1]]).max() == 0


def test_layers_by_name():
    assert layer_numbers("middle", 32) == [16] and layer_numbers("middle", 30) == [15]
    assert layer_numbers("all", 2) == [0, 1, 2] and layer_numbers("2", 2) == [2]
    for wrong in ("3", "-1", "last", "1.5"):
        with pytest.raises(TellError, match=r"--layer.*0 to 2, middle or all"):
            layer_numbers(wrong, 2)


def test_general_queries_pass_over_rows_that_the_template_refuses(tiny_model, tmp_path):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows = [{"messages": turns}] * 3 + [{"messages": [{"role": "system", "content": "Be brief."}, *turns]}]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = load_task(config_of(tiny_model("gemma2"), general={"source": str(tmp_path / "g.jsonl")}))
    for lengths in (None, [5, 5, 5, 5]):
        chosen = general_queries(task, most=4, lengths=lengths)
        assert [e.messages[0].role for e in chosen] == ["user"] * 3
