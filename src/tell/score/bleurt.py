"""BLEURT-20, the learned metric of the paper's translation figures, in PyTorch.

Published by Pu et al., "Learning Compact Metrics for MT" (EMNLP 2021; github.com/google-research/bleurt): RemBERT reads
``[CLS] reference [SEP] candidate [SEP]``, and a linear layer on its pooled first state gives the score, about 0 for a
wrong translation and 1 for a perfect one. Loads the PyTorch port (lucadiliello/BLEURT-20) and ports of the distilled
BLEURT-20-D12, D6 and D3; the older English checkpoints, based on BERT, are refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tell.data.json_text import read_json
from tell.errors import TellError, first_line, require_package
from tell.files import expanded
from tell.score.means import check_pairs

if TYPE_CHECKING:
    import torch
    from sentencepiece import SentencePieceProcessor

WHERE = "eval.bleurt"
_GIVE = "Give the Hugging Face port, lucadiliello/BLEURT-20, or a folder with a copy of it."
_CONFIG, _PIECES, _SAFE, _PICKLED = "config.json", "spm.model", "model.safetensors", "pytorch_model.bin"
_BATCH_TOKENS = 8192  # in one pass, padding included
_ARCHITECTURE = (
    *("vocab_size", "input_embedding_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
)


@dataclass(frozen=True)
class BleurtFiles:
    """A checkpoint on disk: the architecture under RemBERT's names, SentencePiece model, weights, tokens of a pair."""

    config: dict[str, Any]
    pieces: Path
    weights: Path
    max_length: int


class Bleurt:
    """Scores candidates against references; its weights load on first use, in fp32, on the GPU if there is one.

    Args:
        name: folder of a checkpoint, or a name on the Hugging Face hub such as ``lucadiliello/BLEURT-20``.

    Raises:
        TellError: it cannot be found, or is not a BLEURT-20; sentencepiece is not installed.
    """

    def __init__(self, name: str) -> None:
        self.files = find_bleurt(name)
        self._pieces = _load_pieces(self.files.pieces)
        self._special = [self._pieces.PieceToId(piece) for piece in ("[CLS]", "[SEP]")]
        if self._pieces.unk_id() in self._special:
            raise _refused("lacks the pieces [CLS] and [SEP]", self.files.pieces)
        self._loaded: tuple[torch.nn.Module, torch.nn.Linear] | None = None

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """(n,) float64, the score of each pair, independent of the other pairs.

        A pair of more tokens than the checkpoint takes (512) is cut at the end of the longer text, as published.

        Raises:
            TellError: the lengths differ, there is no pair, or the weights do not fit the architecture.
        """
        check_pairs(candidates, references)
        rows = [self.encode(*pair) for pair in zip(references, candidates, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)  # out of memory: fail at once
        scores = np.empty(len(rows))
        start = 0
        while start < len(order):
            batch = order[start : start + max(1, _BATCH_TOKENS // len(rows[order[start]][0]))]
            scores[batch] = self._batch([rows[i] for i in batch])
            start += len(batch)
        return scores

    def encode(self, reference: str, candidate: str) -> tuple[list[int], list[int]]:
        """Ids and segments (0 reference, 1 candidate) of a pair, as ``bleurt/encoding.py`` makes them."""
        # by pieces, which differs from EncodeAsIds where a text contains "[SEP]"
        first, second = (
            [self._pieces.PieceToId(piece) for piece in self._pieces.EncodeAsPieces(text)]
            for text in (reference, candidate)
        )
        while len(first) + len(second) > self.files.max_length - 3:
            (first if len(first) > len(second) else second).pop()
        start, end = self._special
        return [start, *first, end, *second, end], [0] * (len(first) + 2) + [1] * (len(second) + 1)

    def _batch(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        import torch

        if self._loaded is None:
            self._loaded = load_model(self.files)
        body, head = self._loaded
        ids, segments, mask = torch.zeros(3, len(rows), max(len(row[0]) for row in rows), dtype=torch.long)
        for i, (row, kinds) in enumerate(rows):
            ids[i, : len(row)], segments[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), torch.tensor(kinds), 1
        device = head.weight.device
        with torch.inference_mode():
            pooled = body(ids.to(device), attention_mask=mask.to(device), token_type_ids=segments.to(device))[1]
            return head(pooled)[:, 0].tolist()


def find_bleurt(name: str) -> BleurtFiles:
    """The files of a checkpoint: a folder here, or a model of the hub, cached or fetched.

    Raises:
        TellError: it cannot be reached, a file is missing, or it is a BLEURT of another kind.
    """
    folder = expanded(name)
    if not folder.is_dir():
        if folder.exists():
            raise _refused(f"{name} is a file, not a folder")
        folder = _from_hub(name)
    if (folder / "bleurt_config.json").exists():
        raise _refused("is a TensorFlow checkpoint", folder)
    try:
        config = read_json((folder / _CONFIG).read_text(encoding="utf-8"))
        config.setdefault("input_embedding_size", config.get("embedding_size"))
    except (OSError, ValueError, AttributeError) as error:
        reason = "not a JSON object" if isinstance(error, AttributeError) else getattr(error, "strerror", None) or error
        raise _refused(f"cannot be read ({reason})", folder / _CONFIG) from error
    max_length = int(config.get("max_position_embeddings") or 0)
    pieces, weights = folder / _PIECES, folder / (_SAFE if (folder / _SAFE).exists() else _PICKLED)
    for what, fault in (
        ("a factored embedding, so it is not a BLEURT-20", not config["input_embedding_size"] or not max_length),
        ("a SentencePiece model", not pieces.exists()),
        (f"weights ({_SAFE} or {_PICKLED})", not weights.exists()),
    ):
        if fault:
            raise _refused(f"lacks {what}", folder)
    return BleurtFiles({key: config[key] for key in _ARCHITECTURE if key in config}, pieces, weights, max_length)


def _refused(what: str, path: Path | None = None) -> TellError:
    return TellError(what, where=f"{WHERE}: {path}" if path else WHERE, remedy=_GIVE)


def _from_hub(name: str) -> Path:
    from tell.models.hub import HubUnreachable, cached_snapshot, download

    try:
        for weights in (_SAFE, _PICKLED):
            if folder := cached_snapshot(name, need_weights=False, needed=(_CONFIG, _PIECES, weights)):
                return folder
        import huggingface_hub

        _, safe = download(name, need_weights=False)
        wanted = [_CONFIG, _PIECES, _SAFE if _SAFE in safe else _PICKLED]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except HubUnreachable as error:
        raise _refused(f"{name} is not a folder, and the hub does not answer ({error})") from error
    except TellError as error:
        raise _refused(error.what) from error
    except Exception as error:  # httpx's errors, whose module differs between versions
        raise _refused(f"{name} could not be fetched ({first_line(error)})") from error


def _load_pieces(path: Path) -> SentencePieceProcessor:
    require_package("sentencepiece", "bleurt", where=WHERE)
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # it raises any exception of its parser
        raise _refused(f"is not a SentencePiece model ({error})", path) from error


def load_model(files: BleurtFiles) -> tuple[torch.nn.Module, torch.nn.Linear]:
    """RemBERT with its pooling layer, and the linear layer that scores; in fp32, for inference.

    Raises:
        TellError: weights that are missing, or of other names or shapes than the architecture's.
    """
    import torch
    from transformers import RemBertConfig, RemBertModel

    with torch.device("meta"):  # the weights take the place of these parameters
        body = RemBertModel(RemBertConfig(**files.config, bos_token_id=None, eos_token_id=None))
        head = torch.nn.Linear(body.config.hidden_size, 1)
    weights = _weights(files.weights)
    parts = torch.nn.ModuleDict({"body": body, "head": head})
    try:
        parts.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise _refused(f"does not fit BLEURT's architecture ({reason} ...)", files.weights) from error
    body.embeddings.position_ids = torch.arange(body.config.max_position_embeddings).expand((1, -1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return body.float().eval().to(device), head.float().eval().to(device)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors under the names ``body.<RemBertModel's>`` and ``head.weight``, ``head.bias``."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # weights_only: tensors, no code
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise _refused(f"cannot be opened safely ({first_line(error)})", path) from error
    out = {}
    for name, tensor in found.items():
        name = name.replace("classifier.", "head.").replace("embedding_projection", "embedding_hidden_mapping_in")
        if not name.endswith("position_ids"):  # saved by older versions
            out[name.replace("bleurt.", "body.", 1)] = tensor
    return out
