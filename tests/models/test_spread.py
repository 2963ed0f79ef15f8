"""Models larger than a GPU: where their weights are, and that they compute the same."""

from __future__ import annotations

import pytest
import torch

from tell.config_sections import TrainConfig
from tell.decode.engine import Engine
from tell.decode.sampler import Decoding
from tell.errors import TellError
from tell.models import load
from tell.models.base import is_too_large
from tell.models.find import find_model
from tell.models.spread import HOST, places, rooms, spread, told
from tell.train.fast.fused import fused_counts
from tell.train.lora import adapter_applied, add_lora, is_merged, remove_lora, save_adapter
from tell.train.row_losses import row_losses
from train.packed import load as load_plain
from train.packed import make_rows, make_table, wake


class Fetched:
    """Counts the copies that layers ask for; one device plays all of them."""

    def __init__(self, monkeypatch):
        self.bytes, to = 0, torch.Tensor.to

        def counted(tensor, *args, **kwargs):
            if kwargs.get("non_blocking"):
                self.bytes += tensor.nbytes
                return tensor.clone()
            return to(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "to", counted)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3"])
def test_computes_the_same_with_weights_from_elsewhere(family, tiny_model, tmp_path, monkeypatch):
    folder = tiny_model(family)
    table = make_table(make_rows((20, 11, 30)), "task")
    tuned = add_lora(load_plain(folder), config(), seed=1)
    wake(tuned)
    save_adapter(tuned, tmp_path)
    whole = remove_lora(tuned)
    losses = row_losses(whole, table, micro_tokens=64)
    with adapter_applied(whole, tmp_path):
        adapted = row_losses(whole, table, micro_tokens=64)
    model = load_plain(folder)
    linear = sum(m.weight.nbytes for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head")
    others = sum(p.nbytes for p in model.parameters()) - linear
    main = torch.device("cpu", 0)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    held = spread(model, {main: others + linear // 2})
    assert 0 < held[HOST] < linear and held[main] <= others + linear // 2
    fetched = Fetched(monkeypatch)
    assert row_losses(model, table, micro_tokens=10_000) == pytest.approx(losses, rel=1e-5)
    assert fetched.bytes >= held[HOST]
    assert fused_counts(model)["norm"] > 0  # what is on the GPU stays fused
    monkeypatch.setattr("tell.train.lora.is_merged", lambda *a: False)
    with adapter_applied(model, tmp_path):
        assert row_losses(model, table, micro_tokens=64) == pytest.approx(adapted, rel=1e-5)
        answers = Engine(model).generate([[5, 6, 7]], Decoding(max_new_tokens=6, stop_ids=(), greedy=True))
    monkeypatch.undo()
    with adapter_applied(whole, tmp_path):
        expected = Engine(whole).generate([[5, 6, 7]], Decoding(max_new_tokens=6, stop_ids=(), greedy=True))
    assert answers[0].ids == expected[0].ids
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][1])
        hooked = model.get_submodule(name.rpartition(".")[0])._forward_pre_hooks
        assert not hooked or p.data_ptr() == before[name][0]  # back home, and never joined


def config():
    from tell.config_sections import TrainConfig

    return TrainConfig(lora_r=4)


def test_a_failing_layer_puts_its_weight_back(tiny_model):
    model = load_plain(tiny_model("llama"))
    spread(model, {torch.device("cpu", 0): 0.0})
    layer = model.model.layers[0].mlp.up_proj
    home = layer.weight.data_ptr()
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 3))
    assert layer.weight.data_ptr() == home


def test_layers_fill_devices_in_order(tiny_model):
    first, second = torch.device("cuda", 1), torch.device("cuda", 0)
    room = {first: 25.0, second: 11.0}
    assert places([10, 10, 4, 9, 5, 1, 1], room, 5) == [first, first, second, HOST, second, second, second]
    model = load_plain(tiny_model("llama"))
    spread(model, {torch.device("cpu", 0): 0.0})
    assert model.device.type == "cpu"


def test_nothing_is_merged_into_weights_elsewhere(tiny_model):
    model = load_plain(tiny_model("llama"))
    names = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj"]
    assert is_merged(model, names)
    model.model.layers[0].mlp.gate_proj.to("meta")
    assert not is_merged(model, names)


def test_room_is_left_to_compute(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    free = {0: 100, 1: 1000, 2: 10}
    main = torch.device("cuda", 1)
    found = rooms(main, lambda device: free[device.index])
    assert list(found) == [main, torch.device("cuda", 0), torch.device("cuda", 2)]
    assert list(found.values()) == [600.0, 90.0, 9.0]
    assert is_too_large(91, 100) and not is_too_large(90, 100)
    text = told({main: 30e9, torch.device("cuda", 0): 5e9, torch.device("cuda", 2): 0, HOST: 1e9})
    assert text == (
        "30.0 GB of the weights are on cuda:1, 5.0 GB on cuda:0, 1.0 GB in the machine's memory, copied in at each use"
    )


def test_a_model_too_large_is_spread_and_not_trained(tiny_model, monkeypatch):
    files = find_model(str(tiny_model("llama")))
    monkeypatch.setattr(load, "_is_too_large", lambda *a: True)
    monkeypatch.setattr(load, "rooms", lambda main, free: {torch.device("cpu", 0): 100_000.0})
    loaded = load.load_model(files, dtype="fp32", device="cpu")
    assert "copied in at each use" in loaded.why
    loaded.model.model.layers[1].mlp.up_proj.to("meta")  # as on another device
    before = [type(module) for module in loaded.model.modules()]
    with pytest.raises(TellError, match=r"no room to train.*model\.base=nf4.*fsdp"):
        add_lora(loaded.model, TrainConfig(), seed=1)
    assert [type(module) for module in loaded.model.modules()] == before


def test_too_large_by_the_free_memory_of_the_gpu(tiny_model, monkeypatch):
    files = find_model(str(tiny_model("llama")))
    size = files.architecture.parameters * 2
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    gpu = torch.device("cuda")
    for free, expected in ((size, True), (2 * size, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert load._is_too_large(files, torch.bfloat16, gpu, "full") is expected
        assert not load._is_too_large(files, torch.bfloat16, gpu, "nf4")
    assert not load._is_too_large(files, torch.bfloat16, torch.device("cpu"), "full")


def test_a_quantised_model_too_large_is_refused_before_it_is_read(tiny_model, monkeypatch):
    monkeypatch.setattr(load, "_is_too_large", lambda *a: True)
    monkeypatch.setattr(load, "check_base", lambda *a: None)
    monkeypatch.setattr(load, "read_weights", lambda *a: pytest.fail("weights are read"))
    with pytest.raises(TellError, match="do not fit into the memory of cpu"):
        load.load_model(find_model(str(tiny_model("llama"))), dtype="fp32", device="cpu", base="nf4")
