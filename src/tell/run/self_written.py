"""General data written by the model itself (self-distillation, arXiv 2402.13669; rehearsal, arXiv 2403.01244).

The model answers the built-in prompts. Once they are used up, or with ``general.self.prompts: invented``, it writes
prompts too: from its chat header alone comes an instruction (Magpie, arXiv 2406.08464). It is told to answer briefly
(the instruction is not kept in the row), since an answer cut off by the limit is discarded. Rows are written in
blocks with a seed each, so a larger amount extends a smaller one; the file is cached by model and settings. A run
takes the first blocks that suffice, however many the file holds, so what it draws from does not depend on other runs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tell.config import Config
from tell.data.builtin import load_prompts
from tell.data.example import Message
from tell.errors import TellError
from tell.files import read_jsonl, write_json, write_jsonl
from tell.home import make_folder, tell_home
from tell.rows.row_cache import cache_key
from tell.rows.template import ChatTokenizer

if TYPE_CHECKING:
    from tell.decode.sampler import Decoding
    from tell.run.session import Session

Enough = Callable[[Sequence[dict]], float]
Block = Callable[[int, Counter[str], Callable[[float], None]], list[dict]]

BLOCK = 128
VERSION = 3
MOST_EMPTY_BLOCKS = 4
USUAL_ROW = {"instruction": "word " * 20, "output": "word " * 60}  # to estimate the yield of a first block
_WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\s\u3040-\u30ff\u4e00-\u9fff]+")  # these count by letter
MARK = "\ufffdtell\ufffd"


def self_file(config: Config, model: str, tokenizer: str) -> Path:
    """The file of the rows of this model with these settings."""
    key = cache_key(
        what="self",
        version=VERSION,
        model=model,
        tokenizer=tokenizer,
        seed=config.seed,
        questions=load_prompts() if config.general.self_.prompts == "builtin" else [],
        arithmetic=[*config.model.arithmetic, config.generate.engine, config.generate.batch_size],
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


def cached_self_file(config: Config, model: str, tokenizer: str, enough: Enough) -> Path | None:
    """The rows a run would take, if enough were written before."""
    rows, blocks = _read(self_file(config, model, tokenizer))
    taken = _first_blocks(rows, blocks, enough)
    return None if taken is None else _part(self_file(config, model, tokenizer), rows, blocks[:taken])


def _read(path: Path) -> tuple[list[dict], list[dict]]:
    """All rows, and the numbers that each block kept and rejected."""
    facts = path.with_suffix(".json")
    if not path.exists() or not facts.exists():
        return [], []
    rows, blocks = read_jsonl(path), json.loads(facts.read_text(encoding="utf-8"))["blocks"]
    written = sum(block["rows"] for block in blocks)
    return (rows[:written], blocks) if len(rows) >= written else ([], [])


def _first_blocks(rows: list[dict], blocks: list[dict], enough: Enough) -> int | None:
    """The number of blocks that suffice; None where all together do not."""
    end = 0
    for number, block in enumerate(blocks, start=1):
        end += block["rows"]
        if end and enough(rows[:end]) >= 1:
            return number
    return None


def _part(path: Path, rows: list[dict], blocks: list[dict]) -> Path:
    """A separate file with the rows of the first blocks."""
    end = sum(block["rows"] for block in blocks)
    part = path.with_name(f"{path.stem}-{end}.jsonl")
    if not part.exists() or read_jsonl(part) != rows[:end]:
        write_jsonl(part, rows[:end])
    return part


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


def write_self_data(session: Session, enough: Enough) -> tuple[Path, dict]:
    """Write general rows until there are enough; rows already written for this model and these settings are reused.

    Args:
        session: of the untuned model.
        enough: share of what is needed that a list of rows makes up, 1 or more when it suffices.

    Returns:
        The file of the rows to use, and ``{"asked", "kept", "thrown": {reason: rows}}`` of their blocks.

    Raises:
        TellError: the model writes nothing usable.
    """
    path = self_file(session.config, session.files.fingerprint, session.chat.fingerprint)

    def block(number: int, thrown: Counter[str], moved: Callable[[float], None]) -> list[dict]:
        return _block(session, number, thrown, moved)

    return write_blocks(session, path, enough, block=block, title="general data, written by the model")


def write_blocks(
    session: Session, path: Path, enough: Enough, *, block: Block, title: str, most: int | None = None
) -> tuple[Path, dict]:
    """Write rows into a cached file, block by block, until there are enough; those that are there are reused.

    Args:
        path: of all rows of this model and these settings.
        enough: as of `write_self_data`.
        block: writes one block by its number; counts reasons for rejected rows; reports the share that is done.
        title: of the progress bar.
        most: blocks after which there are as many rows as there will be; None: until there are enough.

    Returns:
        As `write_self_data`.

    Raises:
        TellError: the model writes nothing usable, and ``most`` is None.
    """
    with _locked(path, session):  # two runs would write the same blocks, and one over the other
        rows, blocks = _read(path)
        taken = _first_blocks(rows, blocks, enough)
        if taken is None:
            if most is None or len(blocks) < most:
                _write_more(session, path, (rows, blocks), enough, block, title, most)
            taken = len(blocks) if most is None else min(most, len(blocks))
        blocks = blocks[:taken]
        part = _part(path, rows, blocks)
    thrown = sum((Counter(block["thrown"]) for block in blocks), Counter())
    facts = {"asked": len(blocks) * BLOCK, "kept": sum(b["rows"] for b in blocks), "thrown": dict(thrown)}
    return part, facts


@contextmanager
def _locked(path: Path, session: Session) -> Iterator[None]:
    """Hold the lock of a file of rows; while another run holds it, poll the session for a stop."""
    from filelock import FileLock, Timeout

    lock = FileLock(make_folder(path.parent) / f".{path.stem}.lock")  # released by the system if its holder dies
    try:
        lock.acquire(timeout=0)
    except Timeout:
        session.display.note("another run is writing this general data; waiting for it")
        with session.display.bar("wait for another run", None, "s") as advance:
            while not lock.is_locked:
                with suppress(Timeout):
                    lock.acquire(timeout=1)
                advance(0)
                session.check()
    try:
        yield
    finally:
        lock.release()


def _write_more(
    session: Session,
    path: Path,
    found: tuple[list[dict], list[dict]],
    enough: Enough,
    block: Block,
    title: str,
    most: int | None,
) -> None:
    """Extend the found rows and blocks, in place and on disk, until there are enough."""
    rows, blocks = found
    seen = {row["instruction"].strip().lower() for row in rows}
    empty = 0
    share = max(0.0, min(1.0, enough(rows)))
    gain = enough([USUAL_ROW] * BLOCK)
    with session.display.bar(title, 100, "%") as advance:
        shown = 0.0

        def show(target: float) -> None:
            nonlocal shown
            step = max(0.0, min(1.0, target) - shown)
            shown += step
            advance(step * 100, f"{len(rows)} rows")
            session.check()

        def moved(part: float) -> None:
            show(share + part * gain)

        show(share)
        while True:
            before, thrown = len(rows), Counter[str]()
            for pair in block(len(blocks), thrown, moved):
                name = pair["instruction"].strip().lower()
                if name in seen:
                    thrown["duplicate"] += 1
                    continue
                seen.add(name)
                rows.append(pair)
            blocks.append({"rows": len(rows) - before, "thrown": dict(thrown)})
            write_jsonl(path, rows)
            write_json(path.with_suffix(".json"), {"blocks": blocks})
            empty = empty + 1 if len(rows) == before else 0
            if most is None and empty >= MOST_EMPTY_BLOCKS:
                raise TellError(
                    f"the model wrote no usable row in {empty * BLOCK} tries ({dict(thrown)})",
                    where="general.source self",
                    remedy="Pass a file of general instruction data with --general.",
                )
            new = max(0.0, min(1.0, enough(rows)))
            gain, share = max(0.0, new - share), new
            show(share)
            if (share >= 1 and rows) or (most is not None and len(blocks) >= most):
                return


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
