"""A recipe of cells that take a second each, on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from homes import home_with_kernels
from studies.studies import recipe_of
from tell.studies.study_folder import StudyFolder


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return home_with_kernels(tmp_path_factory.mktemp("tell-home"))


@contextmanager
def _surroundings(home: Path) -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: more threads only get in each other's way
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TELL_HOME", str(home))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def surroundings(home: Path) -> Iterator[None]:
    with _surroundings(home):
        yield


@pytest.fixture(scope="session")
def whole(tiny_model: Callable[..., Path], home: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """The study of `recipe()`, which nobody stopped; its root is the folder above. Do not write into it."""
    import tell

    root = tmp_path_factory.mktemp("studies") / "whole"
    path = root.with_name("small.yaml")
    path.write_text(yaml.safe_dump(recipe_of(tiny_model("llama"))), encoding="utf-8")
    with _surroundings(home):
        return tell.run_study(path, root=root)


@pytest.fixture
def recipe(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``recipe(name, **keys)``: the file of a small recipe with these keys over its own."""

    def write(name: str = "small", **keys: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe_of(tiny_model("llama"), **keys)), encoding="utf-8")
        return path

    return write
