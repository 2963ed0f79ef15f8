"""Rows and models that do not fit as they are: cut, dropped and counted, or refused by the plan already."""

from __future__ import annotations

import json
import shutil

import pytest

import tell
from run.runs import config_of, read
from tell.data.example import Message
from tell.errors import TellError
from tell.run.task import load_task
from tell.verbs.evaluate import evaluate
from tell.verbs.open_run import open_run

LABELS = {"schema": None, "test": None, "rows": None, "test_rows": None, "test_fraction": 0.4}


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def answers(path, form: str, n: int = 12) -> str:
    labels = ["no", "yes"] * n
    return written(path, [{"prompt": f"Spam? {i}", "completion": form.format(labels[i])} for i in range(n)])


def test_end_tokens_in_answers_are_neither_trained_nor_expected(tiny_model, tmp_path):
    config = config_of(
        tiny_model("qwen2"),
        tmp_path / "run",
        task={**LABELS, "data": answers(tmp_path / "a.jsonl", "{}<|im_end|>")},
        general={"source": "none"},
        eval={"arms": ["base"], "forgetting_rows": 0},
    )
    task = load_task(config)
    assert {e.answer for e in [*task.train, *task.test]} == {"yes", "no"} and set(task.kind.labels) == {"yes", "no"}
    folder = tell.tune(config)
    assert any("is removed; the chat template of qwen2 writes it" in n for n in read(folder.findings)["notices"])
    again = evaluate(folder.root, arms=["base"], test=answers(tmp_path / "b.jsonl", "{}<|im_end|>", 4))
    assert again["arms"]["base"]["accuracy"]["n"] == 4
    lines = (folder.predictions / "eval" / "base.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["reference"] for line in lines} == {"yes", "no"}
    assert evaluate(folder.root, arms=["base"])["arms"]["base"]["accuracy"]["n"] == len(task.test)


def test_a_run_over_thoughts_thinks_wherever_it_is_opened(tiny_model, tmp_path):
    thought = "<think>\nOdd or even.\n</think>\n\n{}"
    options = {"general": {"rows": 4}, "eval": {"arms": ["base", "tell"], "forgetting_rows": 0}}
    task = {**LABELS, "data": answers(tmp_path / "a.jsonl", thought)}
    config = config_of(tiny_model("qwen3"), tmp_path / "run", task=task, **options)
    planned = tell.plan(config)
    assert planned["model"]["thinking"] and any("let the model think" in notice for notice in planned["notices"])
    folder = tell.tune(config)
    opened = open_run(folder.root)
    user = [Message("user", "x")]
    assert opened.chat.thinking and "</think>" not in opened.chat.render(user, add_generation_prompt=True)
    assert read(folder.adapter / "tell.json")["thinking"] is True
    plain = config_of(tiny_model("qwen3"), task={**LABELS, "data": answers(tmp_path / "b.jsonl", "{}")}, **options)
    assert not tell.plan(plain)["model"]["thinking"]


def test_general_rows_that_the_template_refuses_are_dropped_and_counted(tiny_model, tmp_path):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows = [{"messages": turns}] * 5 + [{"messages": [{"role": "system", "content": "Be brief."}, *turns]}]
    general = {"source": written(tmp_path / "g.jsonl", rows), "rows": 3}
    config = config_of(tiny_model("gemma2"), general=general, eval={"forgetting_rows": 0})
    planned = tell.plan(config)
    assert planned["mixture"]["rows"]["general"] == 3
    (dropped,) = planned["dropped_rows"]
    assert dropped["origin"].endswith("g.jsonl:6") and "System role not supported" in dropped["reason"]
    assert not any("dropped" in notice or "left out" in notice for notice in planned["notices"])  # said once
    written(tmp_path / "g.jsonl", rows[5:])
    with pytest.raises(TellError, match=r"g\.jsonl:1: none of the 1 general rows can be trained on; the first: "):
        tell.plan(config)


@pytest.fixture
def wider(tiny_model, tmp_path):
    """A model whose tokenizer got a token that its embedding has no row for."""
    from tokenizers import AddedToken, Tokenizer

    folder = tmp_path / "wider"
    shutil.copytree(tiny_model("llama"), folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("<BILL>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("place", ["prompt", "completion"])
def test_tokens_without_an_embedding_are_refused_by_the_plan(place, wider, tmp_path):
    rows = [{"prompt": f"Sort {i}", "completion": "in" if i % 2 else "out"} for i in range(12)]
    task = {**LABELS, "data": written(tmp_path / "a.jsonl", rows)}
    config = config_of(wider, task=task, general={"source": "none"})
    assert tell.plan(config)["task"]["rows"]  # a token that no row has is no matter
    for row in rows:
        row[place] += " <BILL>"
    written(tmp_path / "a.jsonl", rows)
    with pytest.raises(TellError, match=r"a\.jsonl:\d+: <BILL> is token \d+ of the tokenizer"):
        tell.plan(config)


def test_experts_named_by_hand_are_refused_by_the_plan(tiny_model, tmp_path):
    folder = tmp_path / "mixture"
    shutil.copytree(tiny_model("llama"), folder)
    sizes = json.loads((folder / "config.json").read_text())
    said = r"train.lora_targets: down_proj, gate_proj would name the experts"

    def planned(targets: str, trust: bool = False, **more):
        (folder / "config.json").write_text(json.dumps({**sizes, "num_local_experts": 4, **more}))
        config = config_of(folder, train={"lora_targets": targets}, general={"source": "none"})
        model = config.model.model_copy(update={"trust_remote_code": trust})
        return tell.plan(config.model_copy(update={"model": model}))["notices"]

    with pytest.raises(TellError, match=said):
        planned("q_proj, gate_proj,down_proj")
    assert any("LoRA does not adapt the experts" in notice for notice in planned("all-linear"))
    assert not any("experts" in notice for notice in planned("q_proj"))
    own = {"auto_map": {"AutoModelForCausalLM": "code.Model"}}
    with pytest.raises(TellError, match=said):
        planned("gate_proj,down_proj", **own)  # not trusted: transformers' own code
    assert not any("experts" in n for t in ("all-linear", "gate_proj") for n in planned(t, trust=True, **own))


def test_a_test_prompt_that_the_template_refuses_is_refused_by_the_plan(tiny_model, tmp_path):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    test = written(tmp_path / "t.jsonl", [{"messages": [{"role": "system", "content": "Be brief."}, *turns]}])
    config = config_of(tiny_model("gemma2"), task={"test": test}, general={"source": "none"})
    with pytest.raises(TellError, match=r"t\.jsonl:1: the chat template of gemma2 refuses the conversation"):
        tell.plan(config)


def test_adapters_of_all_arms_say_what_they_need(tiny_model, tmp_path):
    folder = tell.tune(config_of(tiny_model("llama"), tmp_path / "run", eval={"arms": ["sft", "tell"]}))
    other = folder.arms / "sft"
    assert read(other / "tell.json") == read(folder.adapter / "tell.json")
    names = [read(place / "adapter_config.json")["base_model_name_or_path"] for place in (other, folder.adapter)]
    assert names == [str(tiny_model("llama").resolve())] * 2
