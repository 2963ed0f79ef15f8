"""The weights of pseudo-labelled rows: what a readout gives to the values of an answer."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from readout.test_readout import LABEL, TAGS, colours, fit, states_of
from tell.data.closed import ClosedField
from tell.readout.confidence import confidence


def test_of_a_label_it_is_the_probability_of_the_chosen_one():
    classes, answers = colours(24)
    readout = fit(states_of(classes, apart=1.0), answers)
    fresh, right = colours(60, seed=5)
    states = states_of(fresh, apart=1.0, seed=7)
    whole = np.stack([confidence(readout, states, [label] * len(fresh)) for label in LABEL.values])
    assert whole.sum(axis=0) == pytest.approx(np.ones(60))  # over all labels
    sure = confidence(readout, states, right)
    assert sure == pytest.approx(whole[fresh, np.arange(60)])
    wrong = confidence(readout, states, [LABEL.values[(c + 1) % 3] for c in fresh])
    assert sure.mean() > 2 * wrong.mean() and (wrong > 0).all() and (sure <= 1).all()


def test_of_several_fields_it_is_the_geometric_mean_and_uninformed_ones_do_not_count():
    classes, _ = colours(30)
    colour, blank = (ClosedField((name,), "value", ('"x"', '"y"', '"z"')) for name in ("colour", "blank"))
    rng = np.random.default_rng(3)

    def text(c: int, **more) -> str:
        return json.dumps({"colour": "xyz"[c], "tags": ["abc"[c]], "blank": "xyz"[rng.integers(3)], **more})

    states = states_of(classes, apart=3.0)
    readout = fit(states, [text(c) for c in classes], (colour, TAGS, blank))
    *told, last = readout.fields
    readout = replace(readout, fields=(*told, replace(last, loss=last.prior_loss)))  # noise may look informed by chance
    assert [field.informed for field in readout.fields] == [True, True, False]
    one, two, _ = readout.scores(states)
    held, _ = readout.fields[0].calibration.log_probs(one)
    there, gone = readout.fields[1].calibration.log_probs(two)
    for i, c in enumerate(classes[:10]):
        tags = np.where(np.arange(3) == c, there[i], gone[i]).mean()
        expected = np.exp((held[i, c] + tags) / 2)
        assert confidence(readout, states[i : i + 1], [text(c)]) == pytest.approx([expected])
    only = confidence(readout, states[:1], [json.dumps({"tags": []})])  # the other field is not there
    assert only == pytest.approx([np.exp(gone[0].mean())])
    assert np.isnan(confidence(readout, states[:2], ["no JSON", json.dumps({"blank": "x"})])).all()
