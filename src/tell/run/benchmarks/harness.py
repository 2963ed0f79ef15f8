"""lm-evaluation-harness over our engine: its tasks, prompts and metrics; our passes, adapters and anchor.

Imports ``lm_eval``, an extra; nothing imports this module until a benchmark is requested.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import lm_eval
import numpy as np
from datasets import Dataset
from lm_eval import utils
from lm_eval.api import task as task_module
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from tell.anchor.anchor import Anchor
from tell.data.example import Message
from tell.decode.sampler import Decoding
from tell.errors import TellError, first_line
from tell.rows.template import ChatTokenizer
from tell.run.benchmarks.continuations import Pair, continuation_scores
from tell.score.benchmark_tasks import LocalTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tell.decode.protocol import DecodingEngine

ANSWER_TOKENS = 256  # where a task sets no limit; the default of the harness


@dataclass(frozen=True)
class Passes:
    """Tokens of one forward pass, and rows decoded at once."""

    micro_tokens: int = 3072
    batch_size: int = 32


class EngineLM(TemplateLM):
    """A harness model that computes with our forward passes and decodes with our engine.

    Args:
        model: the base model, with or without an adapter merged.
        engine: decodes with ``model``.
        anchor: put on every prompt as on task rows.
        templated: prompts come through `apply_chat_template`.
        advance: called with the number of requests finished.

    Attributes:
        fed: tokens of each row that went through the model; prompts count in full, even where they were shared.
        prompt_tokens, new_tokens: sums over all rows; new tokens are those decoded or scored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        engine: DecodingEngine,
        chat: ChatTokenizer,
        *,
        anchor: Anchor,
        templated: bool,
        passes: Passes = Passes(),
        advance: Callable[[float], None] = lambda n: None,
    ) -> None:
        super().__init__()
        self.model, self.engine, self.chat, self.anchor, self.templated = model, engine, chat, anchor, templated
        self.passes, self.advance = passes, advance
        self.fed: list[int] = []
        self.prompt_tokens = self.new_tokens = 0

    @property
    def eot_token_id(self) -> int:
        return self.chat.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        begin = self.chat.special.get("bos_token")
        found = self.chat.backend.token_to_id(begin) if begin else None
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        return self.chat.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.chat.template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text with the anchor; without a generation prompt, the last message is left open."""
        turns = self.anchor.apply([Message(m["role"], m["content"]) for m in chat_history])  # type: ignore[arg-type]
        text = self.chat.render(turns, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = turns[-1].content
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids of a text; a begin token is added as the tokenizer does, but not if it is there or templated."""
        begins = self.chat.backend.id_to_token(self.prefix_token_id)
        if add_special_tokens is None:
            add_special_tokens = not self.templated and not (begins and string.startswith(begins))
        return self.chat.backend.encode(string, add_special_tokens=add_special_tokens).ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        anchored = [SimpleNamespace(args=(self._anchored(r.args[0]), r.args[1])) for r in requests]
        return super().loglikelihood(anchored, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = [(context, continuation) for _, context, continuation in requests]
        for context, continuation in pairs:
            self._count(len(context), len(continuation))
        return continuation_scores(
            self.model,
            pairs,
            max_positions=self.engine.max_positions,
            micro_tokens=self.passes.micro_tokens,
            device=self.engine.device,
            progress=self.advance,
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts in nats, in windows as long as the model takes."""
        windows, owner = [], []
        for i, request in enumerate(requests):
            rolled = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.engine.max_positions - 1,
                context_len=1,
            )
            found = [(None, *utils.make_disjoint_window(window)) for window in rolled]
            windows += found
            owner += [i] * len(found)
        sums = np.zeros(len(requests))
        np.add.at(sums, owner, [logprob for logprob, _ in self._loglikelihood_tokens(windows)])
        return sums.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for rule, numbers in groups.items():
            settings = normalize_gen_kwargs(json.loads(rule), ANSWER_TOKENS)
            answers = self._answers([self._anchored(requests[i].args[0]) for i in numbers], settings)
            for i, text in zip(numbers, answers, strict=True):
                texts[i] = text
        return texts

    def _answers(self, contexts: list[str], settings: Mapping[str, Any]) -> list[str]:
        most, until = settings["max_gen_toks"], [text for text in settings["until"] if text]
        room = self.engine.max_positions - most
        if room < 1:
            raise TellError(
                f"answers of {most} tokens are requested and the model takes {self.engine.max_positions:,}",
                where="benchmark",
                remedy="Leave that benchmark out, or use a model with a longer context.",
            )
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        ends = [self.chat.backend.token_to_id(text) for text in until]
        sampled = bool(settings.get("do_sample"))
        decoding = Decoding(
            max_new_tokens=most,
            stop_ids=tuple({*self.chat.stop_ids, *(i for i in ends if i in self.chat.added_ids)}),
            greedy=not sampled,
            temperature=settings["temperature"] if sampled else 1.0,
            top_k=settings.get("top_k", 0),
            top_p=settings.get("top_p", 1.0),
            repetition_penalty=1.0,
            batch_size=self.passes.batch_size,
        )
        answers = self.engine.generate(
            prompts,
            decoding,
            progress=lambda _, further: self.advance(further),
            on_token=self._watch(until, len(prompts)),
        )
        texts = [self.chat.decode(answer.ids) for answer in answers]
        for prompt, answer, text in zip(prompts, answers, texts, strict=True):
            drawn = answer.finish == "stop" and not any(end in text for end in until)  # a stop token, which is not kept
            self._count(len(prompt), len(answer.ids) + drawn)
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _watch(self, until: Sequence[str], rows: int) -> Callable[[int, int], bool]:
        """A check, called with each new token, of whether its row has reached a stop text."""
        window = max((len(text.encode()) for text in until), default=0) + 4  # a token is at least one byte
        tails: list[list[int]] = [[] for _ in range(rows)]

        def ended(row: int, token: int) -> bool:
            tail = tails[row] = [*tails[row][-window:], token]
            text = self.chat.decode(tail)
            return any(end in text for end in until)

        return ended

    def _anchored(self, context: str) -> str:
        """A prompt with the anchor; one that comes through the chat template has it already."""
        if self.templated:
            return context
        return "\n\n".join(message.content for message in self.anchor.apply([Message("user", context)]))

    def _count(self, prompt: int, new: int) -> None:
        self.fed.append(prompt + max(0, new - 1))  # the last token is only predicted
        self.prompt_tokens += prompt
        self.new_tokens += new


def load_tasks(names: Sequence[str], local: Mapping[str, LocalTask] | None) -> dict[str, Any]:
    """Tasks of the harness, by its own definitions.

    Args:
        local: rows of each task, read instead of any dataset; None fetches the harness's datasets by name.

    Raises:
        TellError: a dataset cannot be fetched.
    """
    places = [Path(lm_eval.__file__).parent / "tasks" / name for name in ("agieval", "gsm8k", "openbookqa")]
    manager = TaskManager(include_defaults=False, include_path=places)
    members = [
        {"task": name} if local is None else {"task": name, "custom_dataset": _rows(local[name])} for name in names
    ]
    try:
        with _quiet():
            found = manager.load([{"group": "tell", "task": members}])["tasks"]
    except (OSError, ValueError, RuntimeError) as error:
        if local is not None:
            raise
        raise TellError(
            f"the datasets of {', '.join(names)} cannot be fetched ({first_line(error)})",
            where="benchmarks",
            remedy="Give a folder with their files: --benchmark-data DIR.",
        ) from error
    return {name: found[name] for name in names}


def _rows(local: LocalTask) -> Callable[..., dict[str, Dataset]]:
    test = Dataset.from_list(local.test)
    train = Dataset.from_list(local.train) if local.train else test.select([])
    return lambda **_: {"test": test, "train": train}


def answer_task(
    lm: EngineLM, name: str, task: task_module.Task, *, shots: int, limit: int | None
) -> list[dict[str, Any]]:
    """One row per question: ``{"question", "hash", "prompt", "reference", "answer", "scores"}``.

    ``answer`` is what was written, or the choice found likeliest, counted from 0, with ``loglikelihoods`` of all.

    Args:
        shots: examples before each question, the same for every model.
        limit: number of questions, from the first; None for all.
    """
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    with _quiet():
        found = evaluate(
            lm,
            {"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=lm.templated,
            fewshot_as_multiturn=True,
        )
    assert found is not None, "a single process has rank 0"
    rows: dict[int, dict[str, Any]] = {}
    for sample in found["samples"][name]:  # one for each question and filter
        row = rows.setdefault(sample["doc_id"], _row(task, sample))
        for metric in sample["metrics"]:
            row["scores"][metric_name(metric, sample["filter"])] = float(sample[metric])
    return [rows[i] for i in sorted(rows)]


def metric_name(metric: str, filtered: str) -> str:
    """The metric's name in the harness: ``acc``, ``exact_match,strict-match``."""
    return metric if filtered == "none" else f"{metric},{filtered}"


def _row(task: task_module.Task, sample: Mapping[str, Any]) -> dict[str, Any]:
    answers = [responses[0] for responses in sample["resps"]]
    row = {
        "question": sample["doc_id"],
        "hash": sample["doc_hash"][:16],
        "prompt": task.doc_to_text(sample["doc"]),
        "reference": sample["target"],
    }
    if task.OUTPUT_TYPE == "multiple_choice":
        row["loglikelihoods"] = [round(logprob, 6) for logprob, _ in answers]
        row["answer"] = int(np.argmax([logprob for logprob, _ in answers]))
    else:
        row["answer"] = answers[0]
    return {**row, "scores": {}}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the harness's progress bars, warnings and prints; TELL reports what matters in them."""
    logger, bar = logging.getLogger("lm_eval"), task_module.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    task_module.tqdm = lambda rows, **_: rows
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = bar
