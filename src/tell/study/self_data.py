"""General data written by the model itself (Magpie, arXiv 2406.08464; rehearsal, arXiv 2403.01244).

From its chat header alone the model writes an instruction, then answers it. It is asked for short answers
(the wish is not kept in the row), since an answer that runs into the limit is thrown away. Rows are written in
blocks with a seed each, so a larger amount extends a smaller one; the file is kept by model and settings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tell.config import Config
from tell.data.example import Message
from tell.errors import TellError
from tell.home import tell_home
from tell.progress import Display
from tell.rows.cache import cache_key
from tell.rows.template import ChatTokenizer
from tell.run import atomic_path, read_jsonl

BLOCK = 128
VERSION = 1
MOST_EMPTY_BLOCKS = 4
MARK = "\ufffdtell\ufffd"


def self_file(config: Config, model: str, tokenizer: str) -> Path:
    """Where the rows of this model with these settings lie."""
    key = cache_key(
        what="self",
        version=VERSION,
        model=model,
        tokenizer=tokenizer,
        seed=config.seed,
        **config.general.self_.model_dump(),
    )
    return tell_home() / "self" / f"{key}.jsonl"


def cached_self_file(config: Config, model: str, tokenizer: str) -> Path | None:
    path = self_file(config, model, tokenizer)
    return path if path.exists() else None


def user_header(chat: ChatTokenizer) -> tuple[str, str]:
    """Text up to where a user's words begin, and the text that follows them, from the chat template."""
    text = chat.render([Message("user", MARK)], add_generation_prompt=True)
    head, _, tail = text.partition(MARK)
    return head, tail


def is_good(instruction: str, answer: str) -> str | None:
    """Why a pair is thrown away; None to keep it."""
    if len(instruction.split()) < 3:
        return "instruction too short"
    if len(answer.split()) < 2:
        return "answer too short"
    if instruction.strip() == answer.strip():
        return "answer repeats the instruction"
    words = answer.lower().split()
    for n, most in ((1, 0.4), (3, 0.2)):
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        if len(words) >= 12 and grams and max(grams.values()) / max(1, len(words) - n + 1) > most:
            return "repetitive"
    lines = [line.strip().lower() for line in answer.splitlines() if len(line.strip()) > 12]
    if len(lines) >= 4 and len(set(lines)) < 0.7 * len(lines):
        return "repeated lines"
    return None


def write_self_data(
    config: Config,
    chat: ChatTokenizer,
    engine: Any,
    *,
    model: str,
    enough: Callable[[list[dict]], float],
    display: Display,
) -> tuple[Path, dict]:
    """Write until there is enough; rows already written for this model and these settings are kept.

    Args:
        engine: decodes with the untuned model.
        model: the model's fingerprint.
        enough: share of what is needed that a list of rows makes up, 1 or more when it suffices.
        display: shows a bar.

    Returns:
        The file and what was thrown away, by reason.

    Raises:
        TellError: the model writes nothing usable.
    """
    path = self_file(config, model, chat.fingerprint)
    facts_path = path.with_suffix(".json")
    rows = read_jsonl(path) if path.exists() else []
    facts = json.loads(facts_path.read_text(encoding="utf-8")) if path.exists() and facts_path.exists() else {}
    facts = {"blocks": 0, "asked": 0, "kept": 0, "thrown": {}, **facts}
    thrown = Counter(facts["thrown"])
    seen = {row["instruction"].strip().lower() for row in rows}
    empty = 0
    share = max(0.0, min(1.0, enough(rows)))
    if share >= 1:
        return path, facts
    with display.bar("general data, written by the model", 100, "%") as advance:
        advance(share * 100)
        while share < 1:
            before = len(rows)
            for pair in _block(config, chat, engine, facts["blocks"], thrown, display):
                name = pair["instruction"].strip().lower()
                if name in seen:
                    thrown["duplicate"] += 1
                    continue
                seen.add(name)
                rows.append(pair)
            facts["blocks"] += 1
            facts["asked"] += BLOCK
            facts.update(kept=len(rows), thrown=dict(thrown))
            _save(path, rows, facts_path, facts)
            empty = empty + 1 if len(rows) == before else 0
            if empty >= MOST_EMPTY_BLOCKS:
                raise TellError(
                    f"the model wrote no usable instruction in {empty * BLOCK} tries ({dict(thrown)})",
                    where="general.source self",
                    remedy="Give a file of general instruction data with --general.",
                )
            new = max(0.0, min(1.0, enough(rows)))
            advance((new - share) * 100, f"{len(rows)} rows")
            share = new
    return path, facts


def _save(path: Path, rows: list[dict], facts_path: Path, facts: dict) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    with atomic_path(facts_path) as temporary:
        temporary.write_text(json.dumps(facts), encoding="utf-8")


def _block(
    config: Config, chat: ChatTokenizer, engine: Any, block: int, thrown: Counter, display: Display
) -> list[dict]:
    """One block of instructions with answers."""
    from tell.generate.sampler import Decoding

    rules = config.general.self_
    head, tail = user_header(chat)
    # The words of the user end where the template's turn ends: at its first special token, or a line break.
    stop = chat.encode(tail.lstrip() or tail)[:1]
    stops = tuple({*chat.stop_ids, *stop})
    seed = config.seed * 100_003 + block * 2
    ask = Decoding(
        max_new_tokens=rules.max_prompt_tokens,
        stop_ids=stops,
        temperature=rules.temperature,
        top_k=0,
        top_p=rules.top_p,
        repetition_penalty=1.0,
        batch_size=config.generate.batch_size,
        seed=seed,
    )
    written = engine.generate([chat.encode(head)] * BLOCK, ask)
    instructions = []
    for answer in written:
        text = chat.decode(answer.ids).strip()
        if answer.finish != "stop":
            thrown["instruction truncated"] += 1
        elif text:
            instructions.append(text)
        else:
            thrown["instruction empty"] += 1
    if not instructions:
        return []
    reply = Decoding(
        max_new_tokens=rules.max_answer_tokens,
        stop_ids=chat.stop_ids,
        temperature=rules.answer_temperature,
        top_k=0,
        top_p=rules.top_p,
        repetition_penalty=1.0,
        batch_size=config.generate.batch_size,
        seed=seed + 1,
    )
    wish = f"\n\n{rules.answer_wish}" if rules.answer_wish else ""
    prompts = [
        chat.encode(chat.render([Message("user", text + wish)], add_generation_prompt=True)) for text in instructions
    ]
    answers = engine.generate(prompts, reply)
    pairs = []
    for text, answer in zip(instructions, answers, strict=True):
        output = chat.decode(answer.ids).strip()
        reason = "answer truncated" if answer.finish != "stop" else is_good(text, output)
        if reason:
            thrown[reason] += 1
        else:
            pairs.append({"instruction": text, "output": output})
    return pairs
