"""Readouts of closed fields: what they learn from states, what they know not to know, and their file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tell.data.closed import ClosedField
from tell.errors import TellError
from tell.readout.readout import Readout, readout_layers

LABEL = ClosedField((), "value", ("red", "green", "blue"))
TAGS = ClosedField(("tags",), "items", ('"a"', '"b"', '"c"'), True, 0.1)
MAYBE = ClosedField(("size",), "value", ("null",), True)


def states_of(classes: np.ndarray, *, apart: float, width: int = 24, seed: int = 0) -> np.ndarray:
    """(n, 2, width) states: noise, and in both poolings a direction for each class (n,) of so much length."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(99).normal(size=(int(classes.max()) + 1, width))
    return rng.normal(size=(len(classes), 2, width)) + apart * directions[classes][:, None]


def colours(n: int, seed: int = 1) -> tuple[np.ndarray, list[str]]:
    classes = np.random.default_rng(seed).permutation(np.arange(n) % 3)
    return classes, [LABEL.values[c] for c in classes]


def fit(states, answers, fields=(LABEL,), **names) -> Readout:
    return Readout.fit(states, answers, fields, layers=[1, 2], **names)


def test_separable_states_are_read_without_error():
    classes, answers = colours(24)
    readout = fit(states_of(classes, apart=3.0), answers)
    (field,) = readout.fields
    assert field.accuracy == 1 and field.informed and field.loss < 0.1 < field.prior_loss
    fresh, _ = colours(60, seed=5)
    (scores,) = readout.scores(states_of(fresh, apart=3.0, seed=7))
    assert (field.holds(scores) == np.eye(3, dtype=bool)[fresh]).mean() > 0.98
    evidence = field.evidence(scores)
    assert (evidence.argmax(axis=1) == fresh).mean() > 0.98
    assert readout.numbers()[0] == {
        **{"field": "label", "classes": 3, "used": True, "pooling": field.pooling},
        **{"temperature": field.calibration.temperature, "ridge": field.ridge, "rows": 24},
        **{"loss": round(field.loss, 6), "prior_loss": round(field.prior_loss, 6), "accuracy": 1.0},
        "gain_error": round(field.gain_error, 6),
    }


@pytest.mark.parametrize("shares", [(1, 1, 1), (8, 1, 1)])
@pytest.mark.parametrize("n", [15, 30, 90])
def test_random_states_are_known_to_tell_nothing(n, shares):
    """Some draws of noise look informed by chance; most do not, and then the readout adds nothing."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(1000 + seed)
        classes = rng.permutation(np.repeat([0, 1, 2], n * np.array(shares) // sum(shares)))
        answers = [LABEL.values[c] for c in classes]
        found.append(fit(states_of(classes, apart=0, width=60, seed=seed), answers).fields[0])
    assert sum(field.informed for field in found) <= 6  # of 20
    field = next(field for field in found if not field.informed)
    scores = field.scores(np.random.default_rng(0).normal(size=(4, 2, 60)))
    assert field.evidence(scores).tolist() == np.zeros((4, 3)).tolist()


def test_sets_and_fields_that_rows_lack():
    rng = np.random.default_rng(3)
    holds = rng.random((40, 3)) < [0.5, 0.3, 0.6]
    directions = np.random.default_rng(98).normal(size=(3, 24))
    states = rng.normal(size=(40, 2, 24)) * 0.3 + 2 * (holds @ directions)[:, None]
    answers = [
        json.dumps({"tags": [v for v, held in zip("abc", row, strict=True) if held], "size": None if row[0] else i})
        for i, row in enumerate(holds)
    ]
    answers[4:8] = ["no JSON", "{}", '{"tags": []}', '{"size": null}']
    tags, size = fit(states, answers, (TAGS, MAYBE)).fields
    assert (tags.rows, size.rows) == (37, 37)
    assert tags.calibration.threshold is not None and size.calibration.threshold is None
    assert tags.informed and size.informed and size.accuracy > 0.9
    scores = tags.scores((states - states.mean(axis=0)) / (states.std(axis=0) + 1e-3 * states.std() + 1e-6))
    clean = [i for i in range(40) if not 4 <= i < 8]
    assert (tags.holds(scores) == holds)[clean].mean() > 0.97
    evidence = tags.evidence(scores)
    assert evidence.shape == (40, 3) and ((evidence > 0) == holds)[clean].mean() > 0.9
    counts = holds[[i for i in range(40) if i not in (4, 5, 7)]].copy()
    counts[4] = False  # row 6 has no tags
    np.testing.assert_allclose(tags.prior, (counts.sum(axis=0) + 0.5) / 38, atol=1e-6)


def test_names_of_labels_help_where_each_class_has_one_row():
    classes = np.array([0, 1, 2])
    answers = [LABEL.values[c] for c in classes]
    states = states_of(classes, apart=2.0, seed=11)
    names = {"label": states_of(classes, apart=3.0, seed=12)}
    alone, helped = fit(states, answers).fields[0], fit(states, answers, names=names).fields[0]
    assert alone.accuracy == 0 and not alone.informed  # a class that was left out has no row at all
    assert helped.accuracy == 1 and helped.informed and helped.loss < alone.loss
    assert helped.rows == 3  # names are no training rows
    fresh, _ = colours(90, seed=3)
    right = np.zeros(2)
    for seed in range(10):
        states, features = (states_of(c, apart=0.5, seed=seed + 20 * (c is fresh)) for c in (classes, fresh))
        for i, more in enumerate(({}, {"names": {"label": states_of(classes, apart=3.0, seed=100 + seed)}})):
            right[i] += (fit(states, answers, **more).scores(features)[0].argmax(axis=1) == fresh).mean() / 10
    assert right[1] > right[0] + 0.05


def test_values_without_words_have_no_name():
    field = ClosedField(("x",), "value", ('"red"', "3", '"blue"'))
    classes, _ = colours(18)
    answers = [f'{{"x": {field.values[c]}}}' for c in classes]
    names = {"x": states_of(np.array([0, 2]), apart=2.0)}
    assert fit(states_of(classes, apart=2.0), answers, (field,), names=names).fields[0].accuracy > 0.9


@pytest.mark.parametrize("layers", [1, 2, 3, 12, 30, 80])
def test_layers_of_a_model(layers):
    found = readout_layers(layers)
    assert found == sorted(set(found)) and found[-1] == layers and len(found) <= 8
    assert found[0] >= max(1, int(layers / 4))


@pytest.fixture
def saved(tmp_path):
    classes, _ = colours(18)
    texts = [json.dumps({"tags": ["a"] if c else [], "size": None if c else i}) for i, c in enumerate(classes)]
    states = states_of(classes, apart=2.0)
    readout = fit(states, texts, (TAGS, MAYBE))
    readout.save(tmp_path / "readout.safetensors")
    return readout, states, tmp_path / "readout.safetensors"


def test_what_is_loaded_predicts_the_same(saved):
    readout, states, path = saved
    loaded = Readout.load(path)
    for ours, theirs in zip(readout.scores(states), loaded.scores(states), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert loaded.layers == (1, 2) and loaded.numbers() == readout.numbers()
    for ours, theirs in zip(readout.fields, loaded.fields, strict=True):
        assert (ours.field, ours.calibration) == (theirs.field, theirs.calibration)
        np.testing.assert_array_equal(ours.prior, theirs.prior)
    again = path.with_name("again.safetensors")
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def without(facts: dict, key: str) -> dict:
    return {k: v for k, v in facts.items() if k != key}


DAMAGE = {
    "no fields": lambda facts: without(facts, "fields"),
    "no layers": lambda facts: without(facts, "layers"),
    "fields of a number": lambda facts: facts | {"fields": 3},
    "a list": lambda facts: [facts],
    "a field without kind": lambda facts: facts | {"fields": [without(facts["fields"][0], "kind"), facts["fields"][1]]},
    "a field of another size": lambda facts: facts | {"fields": [facts["fields"][1], facts["fields"][0]]},
    "one field more": lambda facts: facts | {"fields": [*facts["fields"], facts["fields"][0]]},
    "another kind": lambda facts: facts | {"fields": [facts["fields"][0] | {"kind": "x"}, facts["fields"][1]]},
    "another pooling": lambda facts: facts | {"fields": [facts["fields"][0] | {"pooling": "x"}, facts["fields"][1]]},
    "a temperature of text": lambda facts: (
        facts | {"fields": [facts["fields"][0] | {"temperature": "x"}, facts["fields"][1]]}
    ),
    "a value that is a number": lambda facts: (
        facts | {"fields": [facts["fields"][0] | {"values": [1, 2, 3]}, facts["fields"][1]]}
    ),
    "no opening": lambda facts: without(facts, "opening"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_readout_is_named(name, saved):
    readout, _, path = saved
    arrays = load_file(path)
    facts = {"layers": [1, 2], "opening": "", "fields": [field.to_dict() for field in readout.fields]}
    save_file(arrays, path, {"tell": json.dumps(facts)})
    assert Readout.load(path).numbers() == readout.numbers()
    save_file(arrays, path, {"tell": json.dumps(DAMAGE[name](facts))})
    with pytest.raises(TellError, match=r"readout\.safetensors"):
        Readout.load(path)


def test_a_broken_file_is_named(saved):
    _, _, path = saved
    data = path.read_bytes()
    for broken in (b"", data[:50], data[:-5], b"x" * 200, b"\xff" * 20):
        path.write_bytes(broken)
        with pytest.raises(TellError, match=r"readout\.safetensors"):
            Readout.load(path)
    save_file({"mean": np.zeros(3, dtype=np.float32)}, path)
    with pytest.raises(TellError, match=r"readout\.safetensors"):
        Readout.load(path)
    with pytest.raises(TellError, match=r"missing\.safetensors"):
        Readout.load(path.with_name("missing.safetensors"))
