"""Two finished runs over one tiny model, and a server of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tell
from homes import home_with_kernels
from run.runs import config_of
from serve.serving import Running, running
from tell.progress import Silent
from tell.serve.served_models import open_models

ARMS = ["base", "tell-free", "tell"]
DECODING = {"greedy": True, "repetition_penalty": 1.0, "max_new_tokens": 40, "closed": "fused"}


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        folder = home_with_kernels(tmp_path_factory.mktemp("tell-home"))
        patch.setenv("TELL_HOME", str(folder))
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def runs(tiny_model, home, tmp_path_factory) -> dict[str, Path]:
    """Run folders by name: JSON objects with closed fields, and labels."""
    root, made = tmp_path_factory.mktemp("runs"), {}
    for name in ("support", "reviews"):
        more = {"generate": DECODING, "eval": {"arms": ARMS, "forgetting_rows": 0}}
        made[name] = tell.tune(config_of(tiny_model("llama"), root / name, example=name, **more)).root
    return made


@pytest.fixture(scope="session")
def models(runs):
    return open_models(list(runs.values()), Silent())


@pytest.fixture
def server(models) -> Iterator[Running]:
    with running(models) as made:
        yield made
