"""Finished runs of tiny models, to be exported; do not write into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tell
from run.conftest import _surroundings, home, surroundings  # noqa: F401  # fixtures
from run.runs import config_of
from tell.folder import RunFolder


@pytest.fixture(scope="session")
def finished(tiny_model: Callable[..., Path], home: Path, tmp_path_factory: pytest.TempPathFactory):  # noqa: F811
    """``finished(family, example, **sections)``: a run with the arms base, tell and tell-free, made once a session."""
    made: dict[tuple, RunFolder] = {}

    def make(family: str, example: str = "support", template: bool = True, **sections) -> RunFolder:
        key = (family, example, template, repr(sections))
        if key not in made:
            more = {} if template else {"template": False}
            config = config_of(
                tiny_model(family, **more),
                tmp_path_factory.mktemp("runs") / f"{example}-{family}",
                example=example,
                **{"eval": {"arms": ["base", "tell", "tell-free"], "forgetting_rows": 0}, **sections},
            )
            with _surroundings(home):
                made[key] = tell.tune(config)
        return made[key]

    return make
