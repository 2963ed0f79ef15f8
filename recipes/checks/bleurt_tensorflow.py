"""Write the tiny TensorFlow checkpoints that tests/score/test_bleurt.py holds our BLEURT to.

    python recipes/checks/bleurt_tensorflow.py tanh|erf PIECES.model OUT.tar.xz

The graph has the operations and the variable names of google-research/bleurt (lib/modeling.py, model.py, encoding.py),
with RemBERT's factored embedding; weights are random. Beside the checkpoint lie the scores the graph gives
(`expected.json`). Needs tensorflow-cpu (2.21 wrote those of the tests) and sentencepiece, in a separate environment.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from sentencepiece import SentencePieceProcessor

tf1 = tf.compat.v1
CONFIG = {
    "vocab_size": 64,
    "embedding_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
}
SETTINGS = {
    "name": "tiny",
    "bert_config_file": "bert_config.json",
    "max_seq_length": CONFIG["max_position_embeddings"],
    "vocab_file": None,
    "do_lower_case": None,
    "sp_model": "sent_piece",
    "dynamic_seq_length": True,
}
REFERENCES = [
    "a bird chirps by the window",
    "this is a random sentence about the weather",
    "Höfnin opnar aftur eftir langan vetur viðgerða",
]
CANDIDATES = ["a bird sings", "the weather is random", "Höfnin"]


def gelu(x):
    """BERT's own; the exact form is tf.nn.gelu."""
    return x * 0.5 * (1.0 + tf.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * tf.pow(x, 3))))


def variable(name, *shape):
    return tf1.get_variable(name, shape=shape)


def dense(x, size, name, activation=None):
    with tf1.variable_scope(name):
        y = tf.einsum("...c,cd->...d", x, variable("kernel", x.shape[-1], size)) + variable("bias", size)
    return activation(y) if activation else y


def layer_norm(x):
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    with tf1.variable_scope("LayerNorm"):
        beta, gamma = variable("beta", x.shape[-1]), variable("gamma", x.shape[-1])
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-12)


def attention(x, mask, heads, width):
    batch, length = tf.shape(x)[0], tf.shape(x)[1]
    with tf1.variable_scope("self"):
        query, key, value = (
            tf.reshape(dense(x, heads * width, name), [batch, length, heads, width])
            for name in ("query", "key", "value")
        )
        scores = tf.einsum("BTNH,BFNH->BNFT", key, query) / math.sqrt(width)
        share = tf.nn.softmax(scores + (1.0 - tf.cast(mask[:, None, None, :], tf.float32)) * -10000.0)
        return tf.reshape(tf.einsum("BNFT,BTNH->BFNH", share, value), [batch, length, heads * width])


def predictions(ids, mask, segments, activation):
    width, size, heads = CONFIG["embedding_size"], CONFIG["hidden_size"], CONFIG["num_attention_heads"]
    with tf1.variable_scope("bert"):
        with tf1.variable_scope("embeddings"):
            x = tf.nn.embedding_lookup(variable("word_embeddings", CONFIG["vocab_size"], width), ids)
            x += tf.matmul(tf.one_hot(segments, 2), variable("token_type_embeddings", 2, width))
            x += variable("position_embeddings", CONFIG["max_position_embeddings"], width)[: tf.shape(ids)[1]][None]
            x = layer_norm(x)
        with tf1.variable_scope("encoder"):
            x = dense(x, size, "embedding_hidden_mapping_in")
            for i in range(CONFIG["num_hidden_layers"]):
                with tf1.variable_scope(f"layer_{i}"):
                    with tf1.variable_scope("attention"):
                        seen = attention(x, mask, heads, size // heads)
                        with tf1.variable_scope("output"):
                            x = layer_norm(dense(seen, size, "dense") + x)
                    with tf1.variable_scope("intermediate"):
                        wide = dense(x, CONFIG["intermediate_size"], "dense", activation)
                    with tf1.variable_scope("output"):
                        x = layer_norm(dense(wide, size, "dense") + x)
        with tf1.variable_scope("pooler"):
            pooled = dense(x[:, 0], size, "dense", tf.tanh)
    return tf.squeeze(dense(pooled, 1, "dense"), 1)


def encode(pieces):
    """(pairs, 3, length) ids, mask and segments, padded to the full length."""
    length = SETTINGS["max_seq_length"]
    rows = []
    for pair in zip(REFERENCES, CANDIDATES, strict=True):
        first, second = map(pieces.EncodeAsPieces, pair)
        while len(first) + len(second) > length - 3:
            (first if len(first) > len(second) else second).pop()
        ids = [pieces.PieceToId(piece) for piece in ["[CLS]", *first, "[SEP]", *second, "[SEP]"]]
        pad = [0] * (length - len(ids))
        rows.append([ids + pad, [1] * len(ids) + pad, [0] * (len(first) + 2) + [1] * (len(second) + 1) + pad])
    return np.array(rows)


def main(kind, pieces, out):
    tf1.disable_eager_execution()
    rows = encode(SentencePieceProcessor(model_file=pieces))
    names = ("input_ids", "input_mask", "segment_ids")
    inputs = {name: tf1.placeholder(tf.int64, [None, None], name) for name in names}
    tf1.train.get_or_create_global_step()
    scores = predictions(*inputs.values(), gelu if kind == "tanh" else lambda x: tf.nn.gelu(x, approximate=False))
    with tempfile.TemporaryDirectory() as place, tf1.Session() as session:
        folder = Path(place) / "checkpoint"
        session.run(tf1.global_variables_initializer())
        draws = np.random.default_rng(1)
        for v in tf1.trainable_variables():
            v.load((draws.normal(0, 0.3, v.shape) + ("gamma" in v.name)).astype(np.float32), session)
        found = session.run(scores, {inputs[name]: rows[:, i] for i, name in enumerate(names)})
        tf1.saved_model.simple_save(session, str(folder), inputs, {"predictions": scores})
        shutil.copy(pieces, folder / "sent_piece.model")
        expected = {"references": REFERENCES, "candidates": CANDIDATES, "scores": found.tolist()}
        for name, data in (("bert_config", CONFIG), ("bleurt_config", SETTINGS), ("expected", expected)):
            (folder / f"{name}.json").write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
        with tarfile.open(out, "w:xz") as archive:
            archive.add(folder, ".")


if __name__ == "__main__":
    main(*sys.argv[1:])
