"""Ridge regression that knows its own leave-one-out error, and the settings it takes by it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tell.readout.ridge import INTERCEPT, RIDGES, TEMPERATURES, THRESHOLDS, Calibration, choose_ridge, fit_ridge


def rows_of(n: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width)) / np.sqrt(width)


def classes_of(n: int, classes: int, *, is_set: bool = False, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if is_set:
        return (rng.random((n, classes)) < 0.4).astype(float)
    return np.eye(classes)[np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])]


@pytest.mark.parametrize("ridge", [0.003, 0.1, 3.0])
@pytest.mark.parametrize(("n", "width", "classes"), [(2, 3, 2), (9, 40, 3), (30, 5, 4), (6, 8, 6)])
@pytest.mark.parametrize("is_set", [False, True])
def test_left_out_predictions_equal_fits_without_each_row(n, width, classes, ridge, is_set):
    """Also with one row of each class, and fewer rows than features."""
    x, y = rows_of(n, width), classes_of(n, classes, is_set=is_set)
    kernel = x @ x.T
    found = fit_ridge(kernel, y, ridge)
    for i in range(n):
        others = np.arange(n) != i
        dual = np.linalg.solve(kernel[np.ix_(others, others)] + INTERCEPT + ridge * np.eye(n - 1), y[others])
        np.testing.assert_allclose(found.left_out[i], (kernel[i, others] + INTERCEPT) @ dual, atol=1e-8)


def test_dual_coefficients_are_the_primal_ones():
    x, y = rows_of(20, 6), classes_of(20, 3)
    dual = fit_ridge(x @ x.T, y, 0.1).dual
    padded = np.column_stack([x, np.full(20, np.sqrt(INTERCEPT))])
    weights = np.linalg.solve(padded.T @ padded + 0.1 * np.eye(7), padded.T @ y)
    np.testing.assert_allclose(x.T @ dual, weights[:-1], atol=1e-9)
    np.testing.assert_allclose(INTERCEPT * dual.sum(axis=0), np.sqrt(INTERCEPT) * weights[-1], atol=1e-9)


@pytest.mark.parametrize("is_set", [False, True])
def test_the_settings_with_the_least_loss_are_chosen(is_set):
    x, noise = rows_of(24, 6), rows_of(24, 6, seed=5)
    y = classes_of(24, 3, is_set=is_set)
    x[:, :3] += 0.5 * y
    kernels = {"noise": noise @ noise.T, "true": x @ x.T}
    found = choose_ridge(kernels, y, 24, is_set=is_set)
    assert found.kernel == "true"
    thresholds = THRESHOLDS if is_set else (None,)
    tried = []
    for kernel, ridge, threshold, temperature in product(kernels.values(), RIDGES, thresholds, TEMPERATURES):
        inverse = np.linalg.inv(kernel + INTERCEPT + ridge * np.eye(24))
        left_out = y - (inverse @ y) / np.diag(inverse)[:, None]
        if is_set:
            p = 1 / (1 + np.exp(-(left_out - threshold) / temperature))
            loss = -np.log(np.maximum(np.where(y == 1, p, 1 - p), 1e-300)).sum(axis=1).mean()
        else:
            p = np.exp(left_out / temperature)
            loss = -np.log((y * p).sum(axis=1) / p.sum(axis=1)).mean()
        tried.append(loss)
    assert found.loss == pytest.approx(min(tried), abs=1e-9)


def test_helpers_take_part_in_the_fit_and_not_in_the_loss():
    x, y = rows_of(12, 6), classes_of(12, 3)
    kernel = x @ x.T
    found = choose_ridge({"one": kernel}, y, 8, is_set=False)
    fit = fit_ridge(kernel, y, found.ridge)
    np.testing.assert_array_equal(found.fit.left_out, fit.left_out)
    assert found.loss == pytest.approx(found.calibration.losses(fit.left_out[:8], y[:8]).mean(), abs=1e-12)
    broken = y.copy()
    broken[8:] = 0  # the helpers' targets matter through the fit alone
    other = choose_ridge({"one": kernel}, broken, 8, is_set=False)
    assert not np.allclose(other.fit.left_out[:8], found.fit.left_out[:8])


def test_probabilities():
    scores = np.array([[0.1, 0.7, -2.0], [0.0, 0.0, 0.0]])
    held, fails = Calibration(None, 0.2).log_probs(scores)
    np.testing.assert_allclose(np.exp(held).sum(axis=1), 1)
    np.testing.assert_allclose(np.exp(held) + np.exp(fails), 1, atol=1e-9)
    np.testing.assert_allclose(held[1], np.log(1 / 3))
    assert (held.argmax(axis=1) == [1, 0]).all()
    held, fails = Calibration(0.3, 0.1).log_probs(scores)
    np.testing.assert_allclose(np.exp(held) + np.exp(fails), 1, atol=1e-12)
    assert ((held > fails) == (scores > 0.3)).all()
    sure = Calibration(None, 0.02).log_probs(np.array([[50.0, 0.0]]))  # no log of 0
    assert np.isfinite(sure).all()
    assert np.isfinite(Calibration(0.1, 0.02).log_probs(np.array([[50.0, -50.0]]))).all()
