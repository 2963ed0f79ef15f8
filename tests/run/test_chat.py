"""Talking to a tuned model."""

from __future__ import annotations

import pytest
import torch

import tell
from tell.data.example import Message
from tell.errors import TellError
from tell.run.answers import Prompting, answer_limit

TEXT = "My tent arrived with a broken pole, order 48213."


@pytest.fixture(scope="module")
def root(finished):
    return finished[0].root


def weights(session) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in session.session.model.named_parameters()}


def answer(root, arm: str, text: str = TEXT, **options) -> str:
    session = tell.chat(root, arm=arm, **options)
    try:
        return "".join(session.stream(text))
    finally:
        session.close()


def test_pieces_join_to_what_plain_peft_answers(root):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    session = tell.chat(root, arm="tell-free", greedy=True)  # peft decides no closed fields
    pieces = list(session.stream(TEXT))
    session.close()
    assert len(pieces) > 1 and all(pieces)
    assert session.history == [Message("user", TEXT), Message("assistant", "".join(pieces))]
    chat, config = session.opened.chat, session.opened.config
    turns = [Message("user", f"Sort this mail.\n\n{TEXT}")]
    ids = torch.tensor([chat.encode(chat.render(turns, add_generation_prompt=True))])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.name), str(root / "adapter"))
    answer = model.generate(
        input_ids=ids,
        do_sample=False,
        max_new_tokens=config.generate.max_new_tokens,
        repetition_penalty=config.generate.repetition_penalty,
        eos_token_id=list(chat.stop_ids),
        pad_token_id=0,
    )[0, ids.shape[1] :]
    assert "".join(pieces) == chat.decode(answer.tolist())


def test_anchor_and_adapter_by_arm(root):
    said = {arm: answer(root, arm, greedy=True) for arm in ("tell", "base", "base+anchor", "tell-anchor", "sft")}
    assert said["tell"] != said["base"]
    session = tell.chat(root, arm="base")
    assert not session.anchor and "no anchor" in session.describe() and "arm base" in session.describe()
    session = tell.chat(root)
    assert session.anchor.text == "Sort this mail." and "Sort this mail." in session.describe()
    session.close()


def test_weights_are_given_back(root):
    base = tell.chat(root, arm="base")
    untouched = weights(base)
    session = tell.chat(root)
    tuned = weights(session)
    assert any(not torch.equal(tuned[name], untouched[name]) for name in tuned)
    session.close()
    assert all(torch.equal(p, untouched[name]) for name, p in weights(session).items())


def test_what_was_said_before_counts(root):
    session = tell.chat(root, greedy=True)
    list(session.stream(TEXT))
    second = "".join(session.stream("And the lamp?"))
    assert [m.role for m in session.history] == ["user", "assistant"] * 2
    shown = session.opened.chat.render(session.anchor.apply(session.history))
    assert shown.count("Sort this mail.") == 1
    session.reset()
    assert session.history == []
    assert "".join(session.stream("And the lamp?")) != second
    session.close()


def test_seed_decides(root):
    first = answer(root, "tell-free", seed=1)
    assert first == answer(root, "tell-free", seed=1)
    assert any(answer(root, "tell-free", seed=seed) != first for seed in range(2, 6))


def test_a_reader_who_leaves_stops_the_answer(root):
    session = tell.chat(root, greedy=True)
    whole = "".join(session.stream(TEXT))
    session.reset()
    pieces = session.stream(TEXT)
    assert whole.startswith(next(pieces))
    pieces.close()
    assert session.history == []
    assert "".join(session.stream(TEXT)) == whole  # nothing of the broken answer is left in the engine
    session.close()


def test_a_prompt_beyond_the_context(root):
    session = tell.chat(root)
    with pytest.raises(TellError, match="tokens and the model takes"):
        list(session.stream("word " * 2000))
    assert session.history == []
    assert list(session.stream(TEXT))
    session.close()


def test_what_is_refused(root, tmp_path):
    with pytest.raises(TellError, match="unknown arm"):
        tell.chat(root, arm="best")
    with pytest.raises(TellError, match="no such run folder"):
        tell.chat(tmp_path / "nowhere")


def test_answer_limit_is_half_as_long_again(root):
    session = tell.chat(root, arm="base")
    config = session.opened.config
    rows = [tell.Example.pair("q", "fox " * n) for n in (3, 40)]
    tokens = len(session.opened.chat.encode("fox " * 40))
    assert answer_limit(config, session.opened.chat, rows) == 8  # as configured
    free = config.model_copy(update={"generate": config.generate.model_copy(update={"max_new_tokens": None})})
    limit = answer_limit(free, session.opened.chat, rows)
    assert 1.5 * tokens <= limit <= 1.5 * tokens + 3
    assert answer_limit(free, session.opened.chat, [tell.Example.pair("q", "no")]) == 16


def test_fixed_examples_are_shown_as_to_test_rows(root):
    """With a system text of their own, which the conversation lacks."""
    session = tell.chat(root, arm="tell-free", greedy=True)
    turns = [Message("system", "Be brief."), Message("user", "Late?"), Message("assistant", "no")]
    session.shots = [tell.Example.of(turns, source="task", origin="")]
    given, generate = [], session._engine.generate

    def watched(prompts, *args, **options):
        given.extend(prompts)
        return generate(prompts, *args, **options)

    session._engine.generate = watched
    list(session.stream(TEXT))
    session.close()
    prompting = Prompting(session.opened.chat, session.anchor, session.shots, examples=0, room=999, seed=1)
    row = tell.Example.of([Message("user", TEXT), Message("assistant", "")], source="task", origin="")
    assert given == prompting.prompts("tell", [row], [])[0]
