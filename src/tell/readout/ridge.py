"""Kernel ridge regression on few rows, with exact leave-one-out predictions, and its choice of settings. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

INTERCEPT = 1.0
"""Added to every kernel of mean diagonal 1, so that the constant is one more feature and leaves one out exactly."""
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TEMPERATURES = (0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.35, 0.6, 1.0, 2.0)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of sets: a rare value's score falls short of 1, since the ridge shrinks it


@dataclass(frozen=True)
class Ridge:
    """A fitted regression.

    Attributes:
        dual: (n, classes) coefficients of the fitted rows.
        left_out: (n, classes) prediction of each row by the fit without it.
    """

    dual: np.ndarray
    left_out: np.ndarray


def fit_ridge(kernel: np.ndarray, targets: np.ndarray, ridge: float) -> Ridge:
    """The regression of targets (n, classes) on rows with a kernel (n, n) without `INTERCEPT`.

    Leave-one-out predictions are exact: y_i - a_i / (K + ridge I)^-1_ii (Rifkin and Lippert, MIT-CSAIL-TR-2007-025).
    """
    inverse = np.linalg.inv(kernel + INTERCEPT + ridge * np.eye(len(kernel)))
    dual = inverse @ targets
    return Ridge(dual, targets - dual / np.diag(inverse)[:, None])


@dataclass(frozen=True)
class Calibration:
    """Maps predictions to probabilities.

    Attributes:
        threshold: of a set, the prediction at which a value is as likely to hold as not; None: the values exclude each
            other, and probabilities are a softmax.
        temperature: divides predictions.
    """

    threshold: float | None
    temperature: float

    def log_probs(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log probability that each value holds, and that it does not, from scores (..., classes)."""
        if self.threshold is None:
            held = log_softmax(scores / self.temperature)
            return held, np.log(np.maximum(-np.expm1(np.minimum(held, -1e-12)), 1e-12))
        x = (scores - self.threshold) / self.temperature
        return -np.logaddexp(0, -x), -np.logaddexp(0, x)

    def losses(self, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """(n,) log loss in nats of scores and targets (n, classes)."""
        held, fails = self.log_probs(scores)
        terms = targets * held if self.threshold is None else targets * held + (1 - targets) * fails
        return -terms.sum(axis=1)


@dataclass(frozen=True)
class Choice:
    """The settings with the least leave-one-out log loss, in nats a row."""

    kernel: str
    ridge: float
    calibration: Calibration
    loss: float
    fit: Ridge


def choose_ridge(kernels: Mapping[str, np.ndarray], targets: np.ndarray, rows: int, *, is_set: bool) -> Choice:
    """Kernel, ridge and calibration by leave-one-out log loss.

    Args:
        kernels: (n, n) each, of the same rows.
        targets: (n, classes) zeros and ones.
        rows: how many rows, the first ones, the loss is taken over; the others are helpers, such as the labels' names.
        is_set: several values may hold at once.
    """
    calibrations = [Calibration(*pair) for pair in product(THRESHOLDS if is_set else (None,), TEMPERATURES)]
    best: Choice | None = None
    for (name, kernel), ridge in product(kernels.items(), RIDGES):
        fit = fit_ridge(kernel, targets, ridge)
        for calibration in calibrations:
            loss = float(calibration.losses(fit.left_out[:rows], targets[:rows]).mean())
            if best is None or loss < best.loss:
                best = Choice(name, ridge, calibration, loss, fit)
    assert best is not None  # at least one kernel
    return best


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log probabilities over the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
