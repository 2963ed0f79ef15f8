"""General data written by the model itself (self-distillation, arXiv 2402.13669; rehearsal, arXiv 2403.01244).

The model answers the built-in prompts. Once they are used up, or with ``general.self.prompts: invented``, it writes
prompts too: from its chat header alone comes an instruction (Magpie, arXiv 2406.08464). It is told to answer briefly
(the instruction is not kept in the row), since an answer cut off by the limit is discarded. Rows are kept in blocks
(`tell.run.written_blocks`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tell.config import Config
from tell.data.builtin import load_prompts
from tell.data.example import Message
from tell.home import tell_home
from tell.rows.row_cache import cache_key
from tell.rows.template import ChatTokenizer
from tell.run.written_blocks import BLOCK, Enough, write_blocks

if TYPE_CHECKING:
    from tell.decode.sampler import Decoding
    from tell.run.session import Session

VERSION = 3
_WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\s\u3040-\u30ff\u4e00-\u9fff]+")  # these count by letter
MARK = "\ufffdtell\ufffd"


def self_file(config: Config, model: str, tokenizer: str, engine: str) -> Path:
    """The file of the rows that an engine wrote with this model and these settings."""
    key = cache_key(
        what="self",
        version=VERSION,
        model=model,
        tokenizer=tokenizer,
        seed=config.seed,
        questions=load_prompts() if config.general.self_.prompts == "builtin" else [],
        arithmetic=[*config.model.arithmetic, engine, config.generate.batch_size],
        **config.general.self_.model_dump(),
    )
    return tell_home() / "self" / f"{key}.jsonl"


def enough_of(config: Config, unit: ChatTokenizer, task_tokens: int) -> Enough:
    """A function of rows: the share they make up of what the mix and the held-out rows need.

    Args:
        unit: tokenizer that amounts are counted in.
        task_tokens: tokens of the task rows in the same unit, for a ratio.
    """
    amount, held_out = config.general, config.eval.forgetting_rows

    def enough(rows: Sequence[dict]) -> float:
        texts = [f"{row['instruction']}\n{row['output']}" for row in rows]
        counted = [len(e.ids) for e in unit.backend.encode_batch(texts, add_special_tokens=False)]
        n = len(rows)
        left = n - min(held_out, n // 4)  # held out as in `load_general`
        ((way, wanted),) = amount.amount(task_tokens).items()
        if way == "rows":
            return left / max(1, wanted)
        need = wanted * task_tokens if way == "ratio" else wanted
        return sum(counted) * left / max(1, n) / max(1.0, need)

    return enough


def user_header(chat: ChatTokenizer) -> tuple[str, str]:
    """The chat template's text before a user's message, and the text after it."""
    text = chat.render([Message("user", MARK)], add_generation_prompt=True)
    head, _, tail = text.partition(MARK)
    return head, tail


def is_good(instruction: str, answer: str) -> str | None:
    """Why a pair is rejected; None to keep it."""
    words = _WORD.findall(answer.lower())
    if len(_WORD.findall(instruction)) < 3:
        return "instruction too short"
    if len(words) < 2:
        return "answer too short"
    if instruction.strip() == answer.strip():
        return "answer repeats the instruction"
    return faulty_text(answer)


def faulty_text(text: str) -> str | None:
    """Why a text is rejected that repeats itself; None to keep it."""
    words = _WORD.findall(text.lower())
    for n, most in ((1, 0.4), (3, 0.2)):
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        if len(words) >= 12 and grams and max(grams.values()) / max(1, len(words) - n + 1) > most:
            return "repetitive"
    lines = [line.strip().lower() for line in text.splitlines() if len(line.strip()) > 12]
    if len(lines) >= 4 and len(set(lines)) < 0.7 * len(lines):
        return "repeated lines"
    return None


def write_self_data(session: Session, enough: Enough, engine: str | None = None) -> tuple[Path, dict]:
    """Write general rows until there are enough; rows already written for this model and these settings are reused.

    Args:
        session: of the untuned model.
        enough: share of what is needed that a list of rows makes up, 1 or more when it suffices.
        engine: wrote the rows that a resumed run goes on with; None: the one that decodes now writes them.

    Returns:
        The file of the rows to use, and ``{"asked", "kept", "thrown": {reason: rows}, "engine"}`` of their blocks.

    Raises:
        TellError: the model writes nothing usable, or rows of another engine are lost.
    """

    def file(engine: str) -> Path:
        return self_file(session.config, session.files.fingerprint, session.chat.fingerprint, engine)

    def block(number: int, thrown: Counter[str], moved: Callable[[float], None]) -> list[dict]:
        return _block(session, number, thrown, moved)

    title = "general data, written by the model"
    return write_blocks(session, file, enough, block=block, title=title, engine=engine)


def _block(session: Session, block: int, thrown: Counter, moved: Callable[[float], None]) -> list[dict]:
    """One block of instructions with answers; ``moved`` is called with the share that is done."""
    config = session.config
    rules = config.general.self_
    given = load_prompts() if rules.prompts == "builtin" else []
    given_blocks = -(-len(given) // BLOCK)
    seed = config.seed * 100_003 + block * 2
    if block < given_blocks:
        prompts = given[block * BLOCK : (block + 1) * BLOCK]
        outputs = answered(session, prompts, seed + 1, thrown, moved)
    else:
        prompts = _invented(session, seed, thrown, lambda part: moved(part / 3))
        outputs = answered(session, prompts, seed + 1, thrown, lambda part: moved((1 + 2 * part) / 3))
    pairs = zip(prompts, outputs, strict=True)
    return [{"instruction": text, "output": output} for text, output in pairs if output is not None]


def _invented(session: Session, seed: int, thrown: Counter, moved: Callable[[float], None]) -> list[str]:
    """Instructions that the model writes from its chat header alone."""
    config, chat, engine = session.config, session.chat, session.engine
    rules = config.general.self_
    head, tail = user_header(chat)
    # The user's message ends where the template's turn ends: at its first special token, or a line break.
    stop = chat.encode(tail.lstrip() or tail)[:1]
    limit = rules.max_prompt_tokens
    ask = decoding_of(config, limit, (*chat.stop_ids, *stop), rules.temperature, seed)
    written = engine.generate([chat.encode(head)] * BLOCK, ask, progress=shares(BLOCK, moved))
    instructions = []
    for answer in written:
        text = chat.decode(answer.ids).strip()
        if answer.finish != "stop":
            thrown["instruction truncated"] += 1
        elif text:
            instructions.append(text)
        else:
            thrown["instruction empty"] += 1
    return instructions


def answered(
    session: Session,
    instructions: Sequence[str],
    seed: int,
    thrown: Counter,
    moved: Callable[[float], None] = lambda part: None,
) -> list[str | None]:
    """The model's answer to each instruction; None where it does not end within the limit or fails `is_good`.

    Args:
        session: of the untuned model; ``general.self`` of its configuration says how answers are drawn.
        seed: of the draws.
        thrown: counts the reasons for rejected answers.
        moved: called with the share that is done.
    """
    config, chat, engine = session.config, session.chat, session.engine
    rules = config.general.self_
    wish = f"\n\n{rules.answer_wish}" if rules.answer_wish else ""
    prompts = [
        chat.encode(chat.render([Message("user", text + wish)], add_generation_prompt=True)) for text in instructions
    ]
    limit = rules.max_answer_tokens
    reply = decoding_of(config, limit, chat.stop_ids, rules.answer_temperature, seed)
    answers = engine.generate(prompts, reply, progress=shares(len(prompts), moved))
    outputs: list[str | None] = []
    for text, answer in zip(instructions, answers, strict=True):
        output = chat.decode(answer.ids).strip()
        reason = "answer truncated" if answer.finish != "stop" else is_good(text, output)
        if reason:
            thrown[reason] += 1
        outputs.append(None if reason else output)
    return outputs


def decoding_of(config: Config, limit: int, stops: Sequence[int], temperature: float, seed: int) -> Decoding:
    """How texts are drawn that are not answers to be scored."""
    from tell.decode.sampler import Decoding

    return Decoding(
        max_new_tokens=limit,
        stop_ids=tuple(dict.fromkeys(stops)),
        temperature=temperature,
        top_k=0,
        top_p=config.general.self_.top_p,
        repetition_penalty=1.0,
        batch_size=config.generate.batch_size,
        seed=seed,
    )


def shares(rows: int, moved: Callable[[float], None]) -> Callable[[int, float], None]:
    """A decoding progress callback that reports the share of rows done."""
    done = 0.0

    def progress(_: int, further: float) -> None:
        nonlocal done
        done += further
        moved(done / max(1, rows))

    return progress
