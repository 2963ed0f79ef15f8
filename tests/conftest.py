"""Fixtures shared by all tests."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers with a thread for each core fight for them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tiny import make_tiny

# Nothing is timed: on a busy machine one example of a fast property may take a second.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


# Nothing here outlives a loss of power, and runs write so many small files that waiting for the disk takes a third of
# their time. What syncs files is tested by what it calls.
os.fsync = lambda handle: None

LONGEST = (  # files of the most seconds, in the order in which they start: none may be left to the end alone
    *("run/test_real.py", "decode/test_real_model.py", "run/test_processes.py", "bench/test_run.py"),
    *("studies/test_ray.py", "ui/test_browser.py", "studies/test_killed.py", "studies/test_engine.py"),
    *("run/test_resume.py", "exports/test_gguf.py", "run/test_pseudo_rows.py", "run/test_search.py"),
    *("exports/test_export.py", "cli/test_run.py", "serve/test_serve.py", "ui/test_ui.py", "test_core_install.py"),
    *("run/test_selected.py", "run/test_self_data.py", "run/test_budget.py", "run/test_readouts.py"),
    *("models/test_convert.py", "train/test_parallel.py", "docs/test_commands.py", "bench/test_gpu.py"),
    *("studies/test_limit.py", "studies/test_packed.py", "hostile/test_hostile.py", "test_types.py", "test_cpu.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist, which would start files of the most tests first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """``tiny_model(family, **options)``: folder of a tiny random model, made once a session. Do not write into it."""
    made: dict[tuple, Path] = {}

    def make(family: str, **options) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = make_tiny(family, tmp_path_factory.mktemp(f"tiny-{family}"), **options)
            gc.freeze()  # a run collects garbage: without going through what torch and transformers have made
        return made[key]

    yield make
    gc.unfreeze()  # at the end of the process modules are collected, else some complain of leaks
