"""Tiny random checkpoints of BLEURT-20's layout, saved as its PyTorch port is."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from transformers import RemBertConfig, RemBertModel

SENTENCES = [
    "a bird chirps by the window",
    "this is a random sentence about the weather",
    "the harbour opens again after a long winter of repairs",
    "Höfnin opnar aftur eftir langan vetur viðgerða",
    "Það rigndi báðum megin jökulsins mestan hluta vikunnar",
]
SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


def write_pieces(path: Path, size: int = 64) -> int:
    """A SentencePiece model with BERT's special pieces; its number of pieces."""
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=out,
        vocab_size=size,
        character_coverage=1.0,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        control_symbols=["[CLS]", "[SEP]"],
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path.write_bytes(out.getvalue())
    return size


def save_port(folder: Path, *, pickled: bool = False, **shape) -> tuple[RemBertModel, torch.nn.Linear]:
    """Write a checkpoint as lucadiliello/BLEURT-20 has it; the model it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_pieces(folder / "spm.model")
    torch.manual_seed(3)
    facts = {**SHAPE, **shape, "vocab_size": size}
    body = RemBertModel(RemBertConfig(**facts, input_embedding_size=8)).eval()
    head = torch.nn.Linear(facts["hidden_size"], 1)
    with torch.no_grad():
        for name, weight in body.named_parameters():
            if "LayerNorm" not in name:  # so that places, segments and layers all count
                weight.normal_(0, 0.3)
        body.embeddings.word_embeddings.weight[0] = 0
    weights = {f"bleurt.{name}": value for name, value in body.state_dict().items()}
    weights = {name.replace("embedding_hidden_mapping_in", "embedding_projection"): v for name, v in weights.items()}
    weights |= {f"classifier.{name}": value for name, value in head.state_dict().items()}
    weights["bleurt.embeddings.position_ids"] = torch.arange(facts["max_position_embeddings"])[None]
    weights = {name: value.contiguous() for name, value in weights.items()}
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "bleurt",
        "architectures": ["BleurtForSequenceClassification"],
        "embedding_size": 8,
        **facts,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return body, head
