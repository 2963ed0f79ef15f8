"""Requests of the chat completions protocol: what is understood, within bounds, and errors in its form."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tell.config_sections import GenerateConfig
from tell.data.cell_text import RowFault
from tell.data.example import Message
from tell.data.layouts import Layout
from tell.data.turns import to_messages
from tell.shown import one_line

MOST_BODY = 4 << 20  # bytes of a request
MOST_STOPS, MOST_MESSAGES, LARGEST = 16, 2048, 1_000_000
CONVERSATION = Layout("messages", {"messages": "messages"})
IDLE = (  # what clients send along that changes no answer
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "top_logprobs"),
)


class Refusal(NamedTuple):
    """The kind of an error: HTTP status, and ``type`` and ``code`` of the protocol."""

    status: int
    type: str
    code: str | None = None


BAD = Refusal(400, "invalid_request_error")
TOO_LONG = Refusal(400, "invalid_request_error", "context_length_exceeded")
NO_TOKEN = Refusal(401, "authentication_error", "invalid_api_key")
NO_PATH = Refusal(404, "invalid_request_error")
NO_MODEL = Refusal(404, "invalid_request_error", "model_not_found")
BAD_METHOD = Refusal(405, "invalid_request_error")
TOO_LARGE = Refusal(413, "invalid_request_error")
NO_JSON = Refusal(415, "invalid_request_error")
TOO_MANY = Refusal(429, "rate_limit_error", "too_many_waiting")
FAILED = Refusal(500, "server_error")
STOPPING = Refusal(503, "server_error", "stopping")


class ApiError(Exception):
    """A request that is not answered.

    Args:
        param: the field that is at fault.
    """

    def __init__(self, refusal: Refusal, message: str, param: str | None = None) -> None:
        self.refusal, self.param = refusal, param
        super().__init__(one_line(message))

    @property
    def body(self) -> dict[str, object]:
        about = {"message": str(self), "type": self.refusal.type, "param": self.param, "code": self.refusal.code}
        return {"error": about}


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class NamedSchema(BaseModel):
    """``json_schema`` of a response format."""

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: NamedSchema | None = None

    @property
    def schema_of_answers(self) -> dict[str, Any] | bool | None:
        """The JSON Schema that answers must follow; None: any text."""
        if self.type == "text":
            return None
        named = self.json_schema if self.type == "json_schema" else None
        return named.json_schema if named is not None else {"type": "object"}


class TemplateSwitches(BaseModel):
    """``chat_template_kwargs``: ``tell_anchor`` is that of the templates that `tell export` writes."""

    model_config = ConfigDict(extra="forbid")
    tell_anchor: bool = True


class ChatRequest(BaseModel):
    """The body of a request; a field that is missing leaves the run's own setting."""

    model_config = ConfigDict(extra="forbid")
    model: str = Field(max_length=500)
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=LARGEST)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    max_tokens: int | None = Field(None, ge=1, le=LARGEST)
    max_completion_tokens: int | None = Field(None, ge=1, le=LARGEST)
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], BeforeValidator(_as_list)] = Field(
        [], max_length=MOST_STOPS
    )
    response_format: ResponseFormat = ResponseFormat()
    chat_template_kwargs: TemplateSwitches = TemplateSwitches()
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"

    @property
    def limit(self) -> int | None:
        """Most new tokens, where the request says."""
        return self.max_completion_tokens or self.max_tokens

    def check_room(self, prompt: int, most: int) -> None:
        """Refuse a prompt that does not fit; an answer for which less room is left than was asked for is cut there.

        Args:
            prompt: tokens of the prompt.
            most: tokens of prompt and answer together.

        Raises:
            ApiError: with both numbers.
        """
        if prompt >= most:
            what = f"the prompt has {prompt:,} tokens, and the model takes {most:,} in all"
            raise ApiError(TOO_LONG, what, "messages")

    def rule(self, own: GenerateConfig, *, constrained: bool) -> GenerateConfig:
        """How the answer is decoded: as the model does, with what the request says; limit and seed are left open.

        Args:
            constrained: by a grammar, which a repetition penalty would fight: JSON repeats quotes, commas and keys.
        """
        said = {key: getattr(self, key) for key in ("temperature", "top_p", "top_k", "repetition_penalty")}
        changes: dict[str, Any] = {key: value for key, value in said.items() if value is not None}
        if self.temperature is not None:
            changes["greedy"] = self.temperature == 0
        if changes.get("greedy"):
            del changes["temperature"]
        if constrained:
            changes["repetition_penalty"] = 1.0
        return own.model_copy(update={**changes, "max_new_tokens": None})

    def turns(self) -> list[Message]:
        """The conversation.

        Raises:
            ApiError: it is not one.
        """
        answer = {"role": "assistant", "content": "-"}  # read as a row of training data, which ends with an answer
        last = self.messages[-1].get("role")
        if last not in ("user", "tool"):
            raise ApiError(
                BAD, f"messages: the last has the role {last!r}; let it be the user's or a tool's", "messages"
            )
        try:
            return to_messages({"messages": [*self.messages, answer]}, CONVERSATION)[:-1]
        except RowFault as fault:
            raise ApiError(BAD, f"messages: {fault}", "messages") from fault


MEANING = {
    "n": "one answer is given to each request",
    "logprobs": "log probabilities are not given",
    "frequency_penalty": "is not supported; send repetition_penalty",
    "presence_penalty": "is not supported; send repetition_penalty",
    "tools": "tools are not supported",
    "tool_choice": "tools are not supported",
}


def parse_request(body: bytes) -> ChatRequest:
    """The request in a body.

    Raises:
        ApiError: it is not JSON, or asks for something that is not understood.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(BAD, f"the body is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ApiError(BAD, "the body is not a JSON object")
    data = {key: value for key, value in data.items() if value is not None and key not in IDLE}
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        where = ".".join(map(str, first["loc"]))
        why = "this server does not know it" if first["type"] == "extra_forbidden" else first["msg"]
        raise ApiError(BAD, f"{where}: {MEANING.get(name, why)}", name or None) from error
    except RecursionError as error:
        raise ApiError(BAD, "the body is nested too deeply") from error
