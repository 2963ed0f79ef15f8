"""A GGUF file opened by llama.cpp (the package ``xllamacpp``): chat requests to token ids, and token ids to answers.

llama.cpp's own Jinja engine renders the template in the file and its own tokenizer encodes the text: what `prompt_ids`
returns is what llama-server, Ollama and LM Studio feed to the model. xllamacpp offers neither as a function, only as
``/apply-template`` and ``/tokenize`` of the HTTP server that it starts on a free port of 127.0.0.1; that server accepts
a random token alone. Answers do not pass through HTTP.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from tell.config_sections import GenerateConfig
from tell.errors import TellError
from tell.score.json_schema import JsonScorer

PACKAGE = "xllamacpp"
INSTALL = "Run pip install 'tell-llm[gguf]' (or pip install xllamacpp)."
MOST_CONTEXT = 8192
"""Tokens of a request unless asked for: models of 128k positions would reserve many GB for each row."""
SECONDS = 120  # for a prompt to be rendered or encoded


@dataclass(frozen=True, slots=True)
class Said:
    """An answer.

    Attributes:
        text: without the template's end of turn, and without the stop text that ended it.
        finish: ``stop`` at an end token or stop text, ``length`` at the limit, ``left`` where the reader left.
        tokens: sampled, the end token included.
    """

    text: str
    finish: Literal["stop", "length", "left"]
    tokens: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks for beyond the way of decoding.

    Attributes:
        max_tokens: at most so many new tokens.
        seed: of sampling.
        stop: texts that end the answer and are not part of it.
        schema: a JSON Schema that the answer obeys, through llguidance inside llama.cpp.
    """

    max_tokens: int
    seed: int = 42
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None


def llama_cpp_ready() -> bool:
    """Whether xllamacpp is installed; does not import it."""
    return find_spec(PACKAGE) is not None


def llama_cpp_version() -> str:
    """The installed version of xllamacpp."""
    return version(PACKAGE)


class LlamaCpp:
    """A GGUF file in memory. Several threads may call its methods at once; ``rows`` answers are decoded together.

    Args:
        file: the GGUF file.
        context: tokens that a prompt and its answer may have together, at most those that the model was trained with.
        rows: answers decoded at once; further requests wait.
        threads: of the CPU; none: llama.cpp's choice.

    Attributes:
        context: as llama.cpp set it up.
        template: the Jinja source in the file.

    Raises:
        TellError: xllamacpp is missing, no GGUF file, or llama.cpp cannot load it.
    """

    def __init__(
        self, file: str | Path, *, context: int = MOST_CONTEXT, rows: int = 1, threads: int | None = None
    ) -> None:
        self.file, self.rows = Path(file), rows
        if not llama_cpp_ready():
            raise TellError("answering with a GGUF file needs xllamacpp (llama.cpp)", where=PACKAGE, remedy=INSTALL)
        _check_magic(self.file)
        self._token = secrets.token_urlsafe(24)
        self._server = _start(self.file, context, rows, threads, self._token)
        address = urlsplit(self._server.listening_address)
        self._address = (address.hostname or "127.0.0.1", address.port or 0)
        # Slots are told by the loop that answers. One that is closed before its loop has begun never ends: the loop's
        # first act undoes what asked it to.
        self._ask("/slots", None)
        props = self._ask("/props", None)
        self.context = int(props["default_generation_settings"]["n_ctx"])
        self.template = str(props.get("chat_template", ""))

    def prompt_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a chat request, rendered by llama.cpp's Jinja engine with the header of the answer.

        Args:
            messages: as in an OpenAI request; contents are text or lists of parts.
            template_kwargs: ``chat_template_kwargs`` of the request.
            tools: of the request, in OpenAI's form.

        Raises:
            TellError: the template or llama.cpp refuses the messages.
        """
        asked: dict[str, Any] = {"messages": [dict(message) for message in messages]}
        if template_kwargs:
            asked["chat_template_kwargs"] = dict(template_kwargs)
        if tools:
            asked["tools"] = list(tools)
        text = self._ask("/apply-template", asked)["prompt"]
        # the rendered text lacks a begin token that the tokenizer writes: `add_special` puts it back, as in a request
        found = self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return [int(token) for token in found["tokens"]]

    def answer(
        self,
        ids: Sequence[int],
        generate: GenerateConfig,
        wanted: Wanted,
        on_text: Callable[[str], object] | None = None,
    ) -> Said:
        """The answer to a prompt.

        Args:
            ids: of the prompt, as from `prompt_ids`.
            generate: greedy or temperature, top_k and top_p, and the repetition penalty.
            on_text: gets each piece of the answer as it comes; True from it ends the answer (the reader left).

        Raises:
            TellError: the prompt does not fit (both numbers are named), or llama.cpp refuses the schema.
        """
        if len(ids) >= self.context:
            what = f"the prompt has {len(ids):,} tokens, and prompt and answer may have {self.context:,}"
            raise TellError(what, where=self.file.name, remedy="Shorten it, or open the file with a larger context.")
        check = None if wanted.schema is None else JsonScorer(dict(wanted.schema)).why_invalid
        pieces: list[str] = []
        last: dict[str, Any] = {}
        raised: list[BaseException] = []

        def take(chunk: dict[str, Any]) -> bool:
            nonlocal last
            last = chunk
            text = "".join(choice.get("text", "") for choice in chunk.get("choices", ()))
            pieces.append(text)
            try:
                return bool(text and on_text and on_text(text) is True)
            except BaseException as error:  # xllamacpp would drop it
                raised.append(error)
                return True

        self._server.handle_completions(self._request(ids, generate, wanted), take)
        if raised:
            raise raised[0]
        if "error" in last:
            raise self._refusal(last["error"])
        text = "".join(pieces)
        finish = next((choice["finish_reason"] for choice in last.get("choices", ())), None)
        tokens = last.get("usage", {}).get("completion_tokens", len(pieces))
        if check and finish == "stop" and (why := check(text)):  # where llama.cpp cannot compile one it says nothing
            what = f"llama.cpp does not hold answers to this schema ({why})"
            raise TellError(what, where="schema", remedy="Simplify it, or ask without a schema.")
        return Said(text, finish if finish in ("stop", "length") else "left", int(tokens))

    def close(self) -> None:
        """Free the model."""
        del self._server

    def _request(self, ids: Sequence[int], generate: GenerateConfig, wanted: Wanted) -> dict[str, Any]:
        """The body of a completion. llama.cpp's own defaults are not ours: min-p 0.05, a random seed, no penalty."""
        body: dict[str, Any] = {
            "prompt": list(ids),
            "stream": True,
            "max_tokens": max(1, min(wanted.max_tokens, self.context - len(ids))),
            "temperature": 0.0 if generate.greedy else generate.temperature,
            "top_k": generate.top_k,
            "top_p": generate.top_p,
            "min_p": 0.0,
            "repeat_penalty": generate.repetition_penalty,
            "repeat_last_n": self.context,  # prompt and answer, as our own penalty
            "seed": wanted.seed % 2**32,
            "stop": list(wanted.stop),
        }
        if wanted.schema is not None:
            import xllamacpp

            body["grammar"] = xllamacpp.json_schema_to_grammar(json.dumps(wanted.schema))
        return body

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """The answer of the HTTP server inside xllamacpp; no proxy of the environment is used."""
        connection = HTTPConnection(*self._address, timeout=SECONDS)
        try:
            data = None if body is None else json.dumps(body).encode()
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
            connection.request("GET" if data is None else "POST", path, data, headers)
            found = json.loads(connection.getresponse().read())
        except (OSError, HTTPException, ValueError) as error:
            what = f"llama.cpp does not answer ({error})"
            raise TellError(what, where=self.file.name, remedy="Try again; report it if it stays.") from error
        finally:
            connection.close()
        if "error" in found:
            raise self._refusal(found["error"])
        return found

    def _refusal(self, error: object) -> TellError:
        said = error.get("message") if isinstance(error, dict) else error
        first = (str(said).strip().splitlines() or ["no reason given"])[0]
        return TellError(f"llama.cpp refuses the request ({first})", where=self.file.name, remedy="Change the request.")


def _check_magic(file: Path) -> None:
    try:
        with file.open("rb") as start:
            magic = start.read(4)
    except OSError as error:
        raise TellError(f"cannot be read ({error.strerror})", where=str(file), remedy="Name a GGUF file.") from error
    if magic != b"GGUF":
        raise TellError("is not a GGUF file", where=str(file), remedy="Make one with `tell export RUN --to gguf`.")


def _start(file: Path, context: int, rows: int, threads: int | None, token: str) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel = context * rows, rows
    params.use_jinja, params.warmup, params.verbosity = True, False, -1
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [token]
    params.ui = False
    params.cache_ram_mib = 0  # prompts of earlier requests are not kept beyond their row
    if threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        what = f"llama.cpp cannot load it ({error})"
        remedy = "Make it again, or lower the context if memory is short."
        raise TellError(what, where=str(file), remedy=remedy) from error
