"""Fixtures shared by all tests."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers with a thread for each core fight for them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tiny import make_tiny

# Nothing is timed: on a busy machine one example of a fast property may take a second.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(family, **options)``: folder of a tiny random model, made once a session. Do not write into it."""
    made: dict[tuple, Path] = {}

    def make(family: str, **options) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = make_tiny(family, tmp_path_factory.mktemp(f"tiny-{family}"), **options)
        return made[key]

    return make
