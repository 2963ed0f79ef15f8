"""Families whose attention is unlike Llama's decode as transformers decodes them."""

from __future__ import annotations

import pytest
import torch
import transformers

from tell.decode.engine import Engine
from tell.decode.sampler import Decoding

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7, 30], [5, 6, 7, 8, 9, 10, 11, 12, 40], [5, 6, 7, 50, 51]]


def model_of(kind: str, **more):
    config = getattr(transformers, f"{kind}Config", None)
    if config is None:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config(**SHAPE, **more), dtype=torch.float32).eval()


def reference(model, prompt: list[int], most: int) -> list[int]:
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == 2:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("DiffLlama", {}),  # asks attention twice a layer
        (  # layers of different widths, the last of which reuse the keys of others
            "Gemma4Text",
            {
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                "sliding_window": 6,
                "global_head_dim": 32,
                "num_kv_shared_layers": 1,
                "vocab_size_per_layer_input": 96,
                "hidden_size_per_layer_input": 16,
            },
        ),
    ],
)
def test_decodes_as_transformers(kind, more):
    model = model_of(kind, **more)
    expected = [reference(model, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in expected}) > 1
    engine = Engine(model)
    for batch in (1, 3):  # more prompts than slots: rows move
        decoding = Decoding(8, (2,), batch_size=batch, greedy=True, repetition_penalty=1.0)
        assert [answer.ids for answer in engine.generate(PROMPTS, decoding)] == expected
