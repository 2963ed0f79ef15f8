"""Our engine under lm-evaluation-harness: prompts, likelihoods and answers as the harness's own model gives them."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason='needs lm-evaluation-harness: pip install "tell-llm[harness]"')

import datasets
import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from run.questions import HUB, write_questions
from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.data.example import Example
from tell.decode.engine import Engine
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import prompt_ids
from tell.run.benchmarks.harness import EngineLM, Passes, answer_task, load_tasks
from tell.score.benchmark_tasks import read_task, task_shots
from train.packed import load

CONTEXTS = (
    "The quick brown fox",
    "Question: What is the capital of Iceland? " * 12 + "\nAnswer:",  # long enough for a pass of its own
    "Answer: ",  # its space moves to the continuation
    "",
)
CONTINUATIONS = (" yes", " no, it is not", "42", " (A) fox")


def ours(folder, *, anchor=NO_ANCHOR, templated=False, micro_tokens=3072) -> EngineLM:
    model = load(folder)
    passes = Passes(micro_tokens)
    return EngineLM(model, Engine(model), ChatTokenizer(folder), anchor=anchor, templated=templated, passes=passes)


def theirs(folder) -> HFLM:
    # not AutoTokenizer: for some families it puts the family's word pattern in place of the tiny model's
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return HFLM(pretrained=load(folder), tokenizer=tokenizer, batch_size=3, device="cpu", add_bos_token=None)


def requests(*rows) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=row) for row in rows]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("micro_tokens", [40, 3072])
def test_likelihoods_and_greedy_flags_equal_the_harness(family, micro_tokens, tiny_model):
    """Also of what the model itself would write, and of that with another last token."""
    lm, hf = ours(tiny_model(family), micro_tokens=micro_tokens), theirs(tiny_model(family))
    pairs = [(context, text) for context in CONTEXTS for text in CONTINUATIONS]
    likeliest = {}
    for context in CONTEXTS[:2]:
        with torch.no_grad():
            ids = lm.tok_encode(context)
            for _ in range(3):
                ids.append(int(hf.model(torch.tensor([ids])).logits[0, -1].argmax()))
        likeliest[context] = lm.chat.backend.decode(ids[-3:], skip_special_tokens=False)
        pairs += [(context, likeliest[context]), (context, likeliest[context] + "!")]
    expected = hf.loglikelihood(requests(*pairs), disable_tqdm=True)
    found = lm.loglikelihood(requests(*pairs))
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert sum(greedy for _, greedy in found) > 0, "nothing was likeliest: the flags were not tried"
    texts = requests(("The dog does not mind at all.",), ("Once upon a time " * 30,))
    assert lm.loglikelihood_rolling(texts) == pytest.approx(
        hf.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3
    )


def test_answers_equal_the_harness_and_end_early(tiny_model):
    lm, hf = ours(tiny_model("llama")), theirs(tiny_model("llama"))
    contexts = CONTEXTS[:3]
    rule = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 24}
    free = hf.generate_until(requests(*((c, {**rule, "until": []}) for c in contexts)), disable_tqdm=True)
    stop = free[0][3:5]  # something that is written
    asked = [(c, {**rule, "until": [stop, "\n\n\n"]}) for c in contexts]
    expected = hf.generate_until(requests(*asked), disable_tqdm=True)
    assert lm.generate_until(requests(*asked)) == expected and expected[0] == free[0].split(stop)[0] != free[0]
    assert len(lm.fed) == 3 and lm.new_tokens < 3 * 24, "a row went on behind the text that ends it"
    assert lm.fed[0] == lm.prompt_tokens + lm.new_tokens - sum(lm.fed[1:]) - 3


def test_prompts_equal_the_harness_own(tmp_path, monkeypatch):
    """From files, without any connection, the harness asks what it asks of the hub's datasets."""
    write_questions(tmp_path)
    shots = {name: task_shots(name, 2 if name == "gsm8k" else None) for name in HUB}
    fetched = []

    def fetch(path, name, **_):
        fetched.append(path)
        task = next(key for key in HUB if path in HUB[key]["path"])
        return datasets.DatasetDict(
            {part: datasets.Dataset.from_list(rows) for part, rows in HUB[task]["rows"].items()}
        )

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", fetch)
        own = load_tasks(list(HUB), None)
    assert sorted(fetched) == sorted(HUB[task]["path"] for task in HUB)
    monkeypatch.setattr(socket.socket, "connect", no_connection)
    local = load_tasks(list(HUB), {name: read_task(name, tmp_path, shots=shots[name]) for name in HUB})
    for name in HUB:
        asked = []
        for task in (own[name], local[name]):
            task.set_config("num_fewshot", shots[name])
            task.set_fewshot_seed(1234)
            task.build_all_requests()
            asked.append([(r.args, r.request_type) for r in task.instances])
        assert asked[0] == asked[1] and asked[0]
        assert own[name].config.metric_list == local[name].config.metric_list


def no_connection(*_):
    raise AssertionError("a connection was tried")


@pytest.mark.parametrize("place", ["user", "system"])
def test_prompts_carry_the_anchor_as_task_rows_do(place, tiny_model, tmp_path):
    anchor = Anchor("Sort this mail.", place)
    lm = ours(tiny_model("llama"), anchor=anchor, templated=True)
    text = lm.apply_chat_template([{"role": "user", "content": "Where is my parcel?"}])
    example = Example.pair("Where is my parcel?", "shipping", source="task", origin="x")
    assert lm.tok_encode(text) == list(prompt_ids(lm.chat, example, anchor))
    open_ended = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(open_ended, add_generation_prompt=False).endswith("<|im_start|>assistant\nIt is")
    plain = ours(tiny_model("llama"), anchor=anchor)
    bare = ours(tiny_model("llama"))
    asked = plain.loglikelihood(requests(("Where?", " no")))
    assert asked == bare.loglikelihood(requests(("Sort this mail.\n\nWhere?", " no")))
    assert asked != bare.loglikelihood(requests(("Where?", " no")))


def test_rows_and_scores_of_a_task(tiny_model, tmp_path):
    """Scores equal those by hand; the examples shown do not depend on how often a task was asked."""
    write_questions(tmp_path)
    lm = ours(tiny_model("llama"))
    names = ["openbookqa", "gsm8k"]
    tasks = load_tasks(names, {name: read_task(name, tmp_path, shots=1) for name in names})
    rows = answer_task(lm, "openbookqa", tasks["openbookqa"], shots=1, limit=2)
    assert [row["question"] for row in rows] == [0, 1] and all(len(row["loglikelihoods"]) == 4 for row in rows)
    for row in rows:
        assert row["scores"]["acc"] == float(row["answer"] == row["reference"])
        assert row["answer"] == max(range(4), key=row["loglikelihoods"].__getitem__)
    assert answer_task(lm, "openbookqa", tasks["openbookqa"], shots=1, limit=2) == rows
    assert answer_task(lm, "openbookqa", tasks["openbookqa"], shots=0, limit=2) != rows
    written = answer_task(lm, "gsm8k", tasks["gsm8k"], shots=1, limit=None)
    assert len(written) == len(HUB["gsm8k"]["rows"]["test"])
    assert set(written[0]["scores"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert json.loads(json.dumps(written)) == written and "#### " in written[0]["reference"]
