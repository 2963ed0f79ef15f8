"""Two processes train what one trains: losses, gradients, adapter, resume; and none waits for one that failed."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import forked
from tell.errors import TellError
from tell.train.launch import Launch, launched, refuse_several
from tell.train.parallel import Processes, _check_alike, split_rows
from train.packed import assert_close, load, make_rows
from train.processes import CASES, train


@pytest.fixture(scope="module")
def both(tiny_model, tmp_path_factory) -> Path:
    """What two processes left."""
    out = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    running = []
    for rank in ("0", "1"):
        env = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        with (out / f"{rank}.txt").open("w") as said:
            arguments = (str(tiny_model("llama")), str(out))
            running.append(forked.start(arguments, env, stdout=said, stderr=said, module="train.processes"))
    for process in running:
        process.join(forked.PATIENCE)
    texts = [(out / f"{rank}.txt").read_text() for rank in ("0", "1")]
    assert [process.exitcode for process in running] == [0, 3], "\n".join(texts)
    return out


def saw(out: Path, case: str) -> list:
    return [torch.load(out / f"{case}.{rank}.pt") for rank in (0, 1)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logs" / "tell.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(both, tiny_model, tmp_path, case):
    config = CASES[case].model_copy(
        update={"parallel": "auto", "fast": "auto" if case in ("ddp", "objective") else "off"}
    )
    gradients, result, base = train(tiny_model("llama"), tmp_path / case, config)
    ones, twos = log(tmp_path / case), log(both / case)
    rounding = 100 if "bf16" in case else 1
    assert len(twos) == 5
    for key in ("step", "tokens", "learning_rate"):
        assert [row[key] for row in twos] == [row[key] for row in ones]
    for one, two in zip(ones, twos, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4 * rounding)
        assert two["by_source"] == pytest.approx(one["by_source"], rel=1e-4 * rounding)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3 * rounding)
    seen = saw(both, case)
    whole = sum(p.numel() for p in base.parameters())
    for theirs, tokens, trained, here in seen:
        assert (tokens, trained) == (result.tokens, result.trained_tokens)
        assert here == (whole // 2 if "fsdp" in case else whole)  # numbers of the base model that a process holds
        b = {key: value for key, value in gradients[0].items() if value.norm() > 0}  # A has none before B moves
        assert_close({key: theirs[0][key] for key in b}, b, tolerance=1e-5 if rounding == 1 else 0.05)
        if rounding == 1:
            assert_close(theirs[-1], gradients[-1], tolerance=1e-2)
    for mine, theirs in zip(seen[0][0], seen[1][0], strict=True):  # the sum is the same in both, to the bit
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert_close(adapter(both / case), adapter(tmp_path / case), tolerance=1e-2 if rounding == 1 else 0.3)
    assert (both / case / "adapter" / "adapter_config.json").exists()


def test_no_process_copies_the_whole_model(both, tiny_model):
    """The first maps the files; the second gets one layer at a time, next to its half."""
    model = load(tiny_model("llama"))
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    outside = sum(p.numel() for p in model.parameters()) - sum(layers)
    (odd, _, copied), (also_odd, held, _) = saw(both, "shards")
    assert odd == also_odd == copied == []
    assert max(held) == max(sum(layers) // 2 + outside, sum(layers[:-1]) // 2 + layers[-1])


@pytest.mark.parametrize("case", ["ddp", "fsdp", "objective"])
def test_a_signal_to_one_stops_both_and_the_run_resumes(both, case):
    assert all("stopped after step 2 of 5" in text for text in saw(both, f"{case}-stopped"))
    whole, resumed = adapter(both / case), adapter(both / f"{case}-stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    pairs = zip(log(both / case), log(both / f"{case}-stopped"), strict=True)
    assert all(a["loss"] == b["loss"] for a, b in pairs)


def test_a_failing_process_ends_both_with_its_error(both):
    (kind, text, busy), (own, reason, own_busy) = saw(both, "broken")
    assert own == "IndexError" and kind == "TellError"
    assert text.startswith(f"rank 1: {reason[:20]}")
    assert not busy and not own_busy


def test_both_diverge(both):
    assert saw(both, "diverged")[0] == saw(both, "diverged")[1]
    kind, text, busy = saw(both, "diverged")[0]
    assert kind == "Diverged" and "training diverged at step 2" in text and not busy


def test_a_dead_process_is_not_waited_for(both):
    kind, text, busy = torch.load(both / "dead.0.pt")
    assert kind == "TellError" and "another process of this run has ended" in text and busy


@given(st.lists(st.integers(2, 60), min_size=1, max_size=20), st.integers(1, 5))
def test_shares(lengths, parts):
    rows = make_rows(lengths)
    shares = split_rows(rows, parts)
    assert len(shares) == parts
    order = {id(row): i for i, row in enumerate(rows)}
    places = [[order[id(row)] for row in share] for share in shares]
    assert sorted(i for place in places for i in place) == list(range(len(rows)))
    assert all(place == sorted(place) for place in places)
    loads = [sum(len(row.ids) for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
    again = [[order[id(row)] for row in share] for share in split_rows(rows, parts)]
    assert again == places


def test_launch(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    refuse_several("chat")
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert launched() is None  # a scheduler's rank and size alone are no launcher's
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launched() == Launch(5, 8, 1)
    with pytest.raises(TellError, match="tell chat: runs in one process"):
        refuse_several("chat")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() is None


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_several_processes_on_a_device_they_do_not_share(device):
    with pytest.raises(TellError, match=f"several processes do not train on {device}"):
        Processes(Launch(0, 2, 0), device, sharded=False)


def test_models_that_are_not_built_alike_are_refused():
    """By names and shapes; number formats are the first process's."""
    here = {"a": ((2, 3), torch.float32), "b": ((4,), torch.float32)}
    _check_alike(here, {"a": ((2, 3), torch.bfloat16), "b": ((4,), torch.float32)})
    for other in ({"a": ((2, 3), torch.float32)}, here | {"b": ((5,), torch.float32)}):
        with pytest.raises(TellError, match=r"not built as in the first process \(b\)"):
            _check_alike(here, other)
    with pytest.raises(TellError, match="another order"):
        _check_alike(here, dict(reversed(here.items())))
