"""BLEURT against RemBERT in transformers and the published encoding; TELL_BLEURT names real weights to try."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import RemBertConfig, RemBertModel

from bleurts import SENTENCES, save_port
from tell.errors import TellError
from tell.models import hub
from tell.score.bleurt import Bleurt, find_bleurt, load_model
from tell.score.scorers import make_scorer

CANDIDATES = ["a bird sings", "the weather is random", "", "Höfnin opnar", "viðgerða " * 30]


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Folder, body and head of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("bleurt")
    return folder, *save_port(folder)


@pytest.fixture(scope="module")
def bleurt(port):
    return Bleurt(str(port[0]))


def published_rows(references, candidates, pieces, length):
    """``encode_batch`` of google-research/bleurt: pieces, cut pair by pair, padded to the full length."""
    rows = []
    for reference, candidate in zip(references, candidates, strict=True):
        first, second = pieces.EncodeAsPieces(reference), pieces.EncodeAsPieces(candidate)
        while len(first) + len(second) > length - 3:
            if len(first) > len(second):
                first.pop()
            else:
                second.pop()
        tokens = ["[CLS]", *first, "[SEP]", *second, "[SEP]"]
        pad = [0] * (length - len(tokens))
        ids = [pieces.PieceToId(token) for token in tokens]
        segments = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        rows.append([ids + pad, [1] * len(tokens) + pad, segments + pad])
    return torch.tensor(rows).unbind(1)


def test_scores_are_those_of_rembert_and_a_linear_layer(port, bleurt):
    folder, body, head = port
    pieces = SentencePieceProcessor(model_file=str(folder / "spm.model"))
    ids, mask, segments = published_rows(SENTENCES, CANDIDATES, pieces, 32)
    with torch.no_grad():
        hidden = body(ids, attention_mask=mask, token_type_ids=segments).last_hidden_state
        pooled = torch.tanh(body.pooler.dense(hidden[:, 0]))
        expected = head(pooled)[:, 0].numpy()
    assert bleurt.score(CANDIDATES, SENTENCES) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 0.05  # texts tell
    assert abs(bleurt.score(SENTENCES, CANDIDATES) - expected).max() > 0.05  # and so does which is the reference


def test_a_score_depends_on_its_pair_alone(bleurt, monkeypatch):
    together = bleurt.score(CANDIDATES, SENTENCES)
    alone = [bleurt.score([c], [r])[0] for c, r in zip(CANDIDATES, SENTENCES, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    monkeypatch.setattr("tell.score.bleurt._BATCH_TOKENS", 40)
    assert bleurt.score(CANDIDATES[::-1], SENTENCES[::-1]) == pytest.approx(together[::-1], abs=1e-5)


words = st.lists(st.sampled_from([*" ".join(SENTENCES).split(), "日本", "[SEP]", "a\nb"]), max_size=40).map(" ".join)


@given(words, words)
@settings(max_examples=60)
def test_pairs_are_encoded_as_published(bleurt, reference, candidate):
    ids, mask, segments = published_rows([reference], [candidate], bleurt._pieces, 32)
    n = int(mask.sum())
    assert bleurt.encode(reference, candidate) == (ids[0, :n].tolist(), segments[0, :n].tolist())


def test_parameters_are_those_of_bleurt_20():
    """Names and shapes at RemBERT's size, without memory; the authors give 579 M parameters, without the last layer."""
    with torch.device("meta"):
        body = RemBertModel(RemBertConfig())
    shapes = {name: tuple(value.shape) for name, value in body.state_dict().items()}
    layer = "encoder.layer.31."
    expected = {
        "embeddings.word_embeddings.weight": (250300, 256),
        "embeddings.position_embeddings.weight": (512, 256),
        "embeddings.token_type_embeddings.weight": (2, 256),
        "embeddings.LayerNorm.weight": (256,),
        "encoder.embedding_hidden_mapping_in.weight": (1152, 256),
        f"{layer}attention.self.query.weight": (1152, 1152),
        f"{layer}attention.output.LayerNorm.bias": (1152,),
        f"{layer}intermediate.dense.weight": (4608, 1152),
        f"{layer}output.dense.weight": (1152, 4608),
        "pooler.dense.weight": (1152, 1152),
    }
    assert expected.items() <= shapes.items()
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == pytest.approx(579e6, rel=0.01)
    assert len([name for name in shapes if name.startswith(layer)]) == 16 and "encoder.layer.32" not in str(shapes)


def test_plain_pickles_open_and_others_are_refused(port, tmp_path, bleurt):
    folder = tmp_path / "pickled"
    save_port(folder, pickled=True)
    assert Bleurt(str(folder)).score(CANDIDATES, SENTENCES) == pytest.approx(
        bleurt.score(CANDIDATES, SENTENCES), abs=1e-6
    )
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(os.system))
    with pytest.raises(TellError, match="cannot be opened safely"):
        Bleurt(str(folder)).score(["a"], ["a"])


def test_the_scorer_of_text_has_it_as_its_primary_metric(port, bleurt):
    scorer = make_scorer("text", bleurt=str(port[0]))
    metrics = scorer.score(CANDIDATES, SENTENCES)
    assert scorer.primary == "bleurt"
    assert metrics["bleurt"].per_row == pytest.approx(bleurt.score(CANDIDATES, SENTENCES), abs=1e-6)
    assert metrics["bleurt"].value == pytest.approx(metrics["bleurt"].per_row.mean())
    assert {"chrf", "bleu", "rouge_l"} < set(metrics)
    for kind, more in (("json", {"schema": {"type": "object"}}), ("text", {"custom": "json:dumps"})):
        with pytest.raises(TellError, match=r"eval\.bleurt: .* is not scored by BLEURT"):
            make_scorer(kind, bleurt=str(port[0]), **more)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "bleurt_config.json").write_text("{}"),  # as the authors publish it
            "is a TensorFlow checkpoint. Give the Hugging Face port, lucadiliello/BLEURT-20",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "lacks weights"),
        (lambda f: (f / "spm.model").unlink(), "lacks a SentencePiece model"),
        (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda f: (f / "spm.model").write_text("no model"), "is not a SentencePiece model"),
        (lambda f: change_config(f, embedding_size=None), "lacks a factored embedding, so it is not a BLEURT-20"),
        (lambda f: change_config(f, hidden_size=48), "does not fit BLEURT's architecture"),
        (lambda f: change_config(f, num_hidden_layers=4), "does not fit BLEURT's architecture .*Missing key"),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "cannot be opened safely"),
    ],
)
def test_broken_checkpoints_are_named(damage, message, port, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(port[0], folder)
    damage(folder)
    with pytest.raises(TellError, match=message) as error:
        Bleurt(str(folder)).score(["a"], ["a"])
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_reached_is_said(tmp_path, monkeypatch):
    def gone(*args, **kwargs):
        raise hub.HubUnreachable("no network")

    monkeypatch.setattr(hub, "download", gone)
    with pytest.raises(TellError, match=r"eval\.bleurt: nobody/BLEURT-none is not a folder.*\(no network\)"):
        find_bleurt("nobody/BLEURT-none")
    with pytest.raises(TellError, match=r"eval\.bleurt: .*neither a folder nor a hub name"):
        find_bleurt("not/a/name")
    (tmp_path / "file").write_text("")
    with pytest.raises(TellError, match="is a file, not a folder"):
        find_bleurt(str(tmp_path / "file"))


REAL = os.environ.get("TELL_BLEURT")


@pytest.mark.skipif(not REAL, reason="set TELL_BLEURT to a folder or name of BLEURT-20 to try the published weights")
def test_published_scores():
    """The example on the page of lucadiliello/BLEURT-20."""
    references = ["a bird chirps by the window", "this is a random sentence"]
    scores = Bleurt(str(REAL)).score(["a bird chirps by the window", "this looks like a random sentence"], references)
    assert scores == pytest.approx([0.99905, 0.79302], abs=2e-4)
    body, _ = load_model(find_bleurt(str(REAL)))
    assert (body.config.num_hidden_layers, body.config.hidden_size, body.config.num_attention_heads) == (32, 1152, 18)
