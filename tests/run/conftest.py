"""One finished run with every arm, and a home of its own for what is cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import tell
from homes import home_with_kernels
from run.runs import ALL_ARMS, config_of
from tell.config import Config
from tell.folder import RunFolder


@contextmanager
def _surroundings(home: Path) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: more threads only get in each other's way
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TELL_HOME", str(home))
            yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return home_with_kernels(tmp_path_factory.mktemp("tell-home"))


@pytest.fixture(scope="module", autouse=True)
def surroundings(home: Path) -> Iterator[None]:
    with _surroundings(home):
        yield


@pytest.fixture(scope="session")
def finished(
    tiny_model: Callable[..., Path], home: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, Config]:
    """A run of the json task on a tiny llama with every arm; do not write into it."""
    config = config_of(tiny_model("llama"), tmp_path_factory.mktemp("runs") / "all", eval={"arms": ALL_ARMS})
    with _surroundings(home):
        return tell.tune(config, command="tell tune all"), config
