"""Readout: closed fields read from the untuned model's hidden states by ridge regression on the task rows.

A model knows more of few rows than a few steps of LoRA get out of it (docs/explanation/method.md). Linear probes of
hidden states: Alain and Bengio 2016 (arXiv 1610.01644); classifiers on few rows' embeddings: SetFit (2209.11055).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tell.data.closed import ClosedField
from tell.errors import TellError
from tell.files import DAMAGED, atomic_path
from tell.readout.ridge import INTERCEPT, Calibration, choose_ridge

LAYERS = 8  # states are taken after this many blocks, at equal distances
SMOOTHING = 0.5  # added to each class's count in the prior (Krichevsky and Trofimov 1981)
POOLINGS = {"mean": (0,), "last": (1,), "both": (0, 1)}
"""Which of the two states of a prompt are used: the mean over its tokens, the one of its last token."""


def readout_layers(layers: int) -> list[int]:
    """The blocks after which states are taken, in a model of so many: the upper three quarters."""
    return sorted({int(layer) for layer in np.linspace(max(1, layers / 4), layers, LAYERS).round()})


@dataclass(frozen=True)
class FieldReadout:
    """The regression of one field.

    Attributes:
        pooling: a key of `POOLINGS`.
        weights: (features, classes) float32 of standardised states; the last row is the intercept.
        calibration: of its predictions.
        prior: (classes,) share of the training rows in which each value holds, smoothed.
        rows: training rows that it was fitted on.
        loss: leave-one-out log loss, in nats a row.
        prior_loss: log loss of `prior` on the same rows, in nats a row.
        gain_error: standard error of their difference over the rows.
        accuracy: leave-one-out share of rows whose values are all right.
    """

    field: ClosedField
    pooling: str
    weights: np.ndarray
    calibration: Calibration
    ridge: float
    prior: np.ndarray
    rows: int
    loss: float
    prior_loss: float
    gain_error: float
    accuracy: float

    @property
    def informed(self) -> bool:
        """Whether it tells more than the shares do, leaving one row out.

        The gain must exceed its standard error, since the settings were chosen by the same rows. The shares are not
        left out: without its row a value seems rarer than it is, and a readout that says the same of all would win.
        """
        return self.prior_loss - self.loss > self.gain_error

    def scores(self, features: np.ndarray) -> np.ndarray:
        """(n, classes) predictions of rows with standardised features (n, poolings, d)."""
        return _pooled(features, self.pooling) @ self.weights[:-1] + self.weights[-1]

    def holds(self, scores: np.ndarray) -> np.ndarray:
        """(n, classes) bool, the values that hold by predictions (n, classes)."""
        if self.calibration.threshold is not None:
            return scores > self.calibration.threshold
        return np.arange(scores.shape[1]) == scores.argmax(axis=1)[:, None]

    def evidence(self, scores: np.ndarray) -> np.ndarray:
        """(n, classes) what the states add to the shares, in nats; 0 for an uninformed readout.

        Of values that exclude each other the change of log probability, of a set's the change of log odds.
        """
        if not self.informed:
            return np.zeros_like(scores)
        held, fails = self.calibration.log_probs(scores)
        if self.field.is_set:
            return held - fails - np.log(self.prior) + np.log1p(-self.prior)
        return held - np.log(self.prior)

    @property
    def settings(self) -> dict[str, Any]:
        """How it reads and how well, as in metrics.json."""
        return {
            "pooling": self.pooling,
            "temperature": self.calibration.temperature,
            "ridge": self.ridge,
            "rows": self.rows,
            "loss": round(self.loss, 6),
            "prior_loss": round(self.prior_loss, 6),
            "gain_error": round(self.gain_error, 6),
            "accuracy": round(self.accuracy, 6),
        }

    def to_dict(self) -> dict[str, Any]:
        """All but the arrays."""
        return {**self.field.to_dict(), "threshold": self.calibration.threshold, **self.settings}

    @classmethod
    def from_dict(cls, data: dict[str, Any], weights: np.ndarray, prior: np.ndarray) -> FieldReadout:
        """From what `to_dict` returns, and the arrays."""
        field, pooling, threshold = ClosedField.from_dict(data), data["pooling"], data["threshold"]
        calibration = Calibration(None if threshold is None else float(threshold), float(data["temperature"]))
        numbers = {key: float(data[key]) for key in ("ridge", "loss", "prior_loss", "gain_error", "accuracy")}
        if weights.shape[1:] != (field.classes,) or prior.shape != (field.classes,):
            raise ValueError(f"{field.name}: {field.classes} classes, weights of shape {weights.shape}")
        if pooling not in POOLINGS or field.is_set != (threshold is not None) or not calibration.temperature > 0:
            raise ValueError(f"{field.name}: {pooling}, {calibration}")
        return cls(field, pooling, weights, calibration, prior=prior, rows=int(data["rows"]), **numbers)


@dataclass(frozen=True)
class Readout:
    """The readouts of a task's closed fields.

    Attributes:
        layers: blocks after which states are taken.
        mean, scale: (poolings, d) float32, by which states are standardised.
        opening: what every answer begins with, see `tell.data.closed.opening`.
    """

    layers: tuple[int, ...]
    mean: np.ndarray
    scale: np.ndarray
    fields: tuple[FieldReadout, ...]
    opening: str = ""

    def scores(self, states: np.ndarray) -> list[np.ndarray]:
        """(n, classes) predictions of each field.

        Args:
            states: (n, poolings, d), as `Readout.fit` takes them.
        """
        features = _standardised(states, self.mean, self.scale)
        return [field.scores(features) for field in self.fields]

    def numbers(self) -> list[dict[str, Any]]:
        """``readout`` of metrics.json: how well each field is read, leaving one training row out."""
        return [
            {"field": of.field.name, "classes": of.field.classes, "used": of.informed, **of.settings}
            for of in self.fields
        ]

    @classmethod
    def fit(
        cls,
        states: np.ndarray,
        answers: Sequence[str],
        fields: Sequence[ClosedField],
        *,
        layers: Sequence[int],
        names: dict[str, np.ndarray] | None = None,
    ) -> Readout:
        """Fit every field on the rows that have it.

        Args:
            states: (n, poolings, d) hidden states of the training prompts, `POOLINGS` of all layers side by side.
            answers: their n answers.
            layers: of the states.
            names: states (k, poolings, d) of the words of a field's values (`ClosedField.words`), by the field's name;
                they are further rows of the regression.
        """
        mean, scale = states.mean(axis=0), states.std(axis=0)
        scale = scale + 1e-3 * float(states.std()) + 1e-6
        features = _standardised(states, mean, scale)
        helpers = {name: _standardised(found, mean, scale) for name, found in (names or {}).items()}
        fitted = [_fit_field(field, features, answers, helpers.get(field.name)) for field in fields]
        return cls(tuple(layers), mean.astype(np.float32), scale.astype(np.float32), tuple(fitted))

    def save(self, path: Path) -> None:
        """Write ``readout.safetensors``."""
        from safetensors.numpy import save

        arrays = {"mean": self.mean, "scale": self.scale}
        for i, field in enumerate(self.fields):
            arrays |= {f"weights.{i}": field.weights, f"prior.{i}": field.prior}
        facts = {
            "layers": list(self.layers),
            "opening": self.opening,
            "fields": [field.to_dict() for field in self.fields],
        }
        data = save(
            {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in arrays.items()}, {"tell": json.dumps(facts)}
        )
        with atomic_path(path) as beside:
            beside.write_bytes(data)

    @classmethod
    def load(cls, path: Path) -> Readout:
        """Read ``readout.safetensors``.

        Raises:
            TellError: it is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["tell"])
                fields = tuple(
                    FieldReadout.from_dict(entry, file.get_tensor(f"weights.{i}"), file.get_tensor(f"prior.{i}"))
                    for i, entry in enumerate(facts["fields"])
                )
                mean, scale, opening = file.get_tensor("mean"), file.get_tensor("scale"), str(facts["opening"])
                made = cls(tuple(facts["layers"]), mean, scale, fields, opening)
            width = made.mean.shape[1]
            if any(len(of.weights) != len(POOLINGS[of.pooling]) * width + 1 for of in fields):
                raise ValueError(f"{len(fields)} fields of states with {width} numbers")
            return made
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise TellError(f"cannot be read ({error})", where=str(path), remedy=DAMAGED) from error


def _fit_field(
    field: ClosedField, features: np.ndarray, answers: Sequence[str], names: np.ndarray | None
) -> FieldReadout:
    found = {i: target for i, answer in enumerate(answers) if (target := field.target(answer)) is not None}
    own = np.stack(list(found.values()))
    n = len(own)
    together, targets = features[list(found)], own
    if names is not None:
        together = np.concatenate([together, names])
        targets = np.concatenate([own, np.eye(field.classes)[list(field.words)]])
    flat = {pooling: _pooled(together, pooling) for pooling in POOLINGS}
    chosen = choose_ridge({k: x @ x.T for k, x in flat.items()}, targets, n, is_set=field.is_set)
    dual, kernel = chosen.fit.dual, chosen.kernel
    weights = np.concatenate([flat[kernel].T @ dual, INTERCEPT * dual.sum(axis=0, keepdims=True)])
    counts = own.sum(axis=0)
    smoothing = SMOOTHING * (2 if field.is_set else field.classes)
    prior = (counts + SMOOTHING) / (n + smoothing)
    terms = own * np.log(prior) + (1 - own) * np.log1p(-prior) if field.is_set else own * np.log(prior)
    prior_losses, losses = -terms.sum(axis=1), chosen.calibration.losses(chosen.fit.left_out[:n], own)
    made = FieldReadout(
        field,
        kernel,
        weights.astype(np.float32),
        chosen.calibration,
        chosen.ridge,
        prior.astype(np.float32),
        n,
        chosen.loss,
        float(prior_losses.mean()),
        float((prior_losses - losses).std() / np.sqrt(n)),
        0.0,
    )
    right = (made.holds(chosen.fit.left_out[:n]) == own.astype(bool)).all(axis=1)
    return replace(made, accuracy=float(right.mean()))


def _standardised(states: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (states - mean) / scale


def _pooled(features: np.ndarray, pooling: str) -> np.ndarray:
    """(n, d or 2 d) features of a pooling, scaled so that a row of unit variance has norm 1."""
    parts = features[:, list(POOLINGS[pooling])]
    flat = parts.reshape(len(parts), -1)
    return flat / np.sqrt(flat.shape[1])
