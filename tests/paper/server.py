"""A small real server on 127.0.0.1 that speaks the chat completions protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from http_server import QuietHandler, serving

Reply = tuple[int, dict | str | bytes]
NOW = {"retry-after-ms": "1"}  # the client honours it, so that no test waits for its backoff


def good(request: dict) -> Reply:
    """A thought that agrees with the label in the request."""
    row = row_of(request)
    verdict = "This is a hallucination." if row["label"] == "yes" else "There is no hallucination."
    return 200, json.dumps({"thought": f"On {row['query']!r}: checked. {verdict}", "hallucination": row["label"]})


def row_of(request: dict) -> dict:
    """Query, response, label and marked passages that the teacher sent."""
    return json.loads(request["messages"][1]["content"])


class Endpoint:
    """What the server was asked, and the function that answers: request to (status, content or error body)."""

    def __init__(self, answer: Callable[[dict], Reply]) -> None:
        self.answer = answer
        self.requests: list[dict] = []
        self.under_way = 0
        self.most_under_way = 0
        self.lock = threading.Lock()
        self.keys: set[str | None] = set()
        self.url = ""
        self.models: list[str] | None = None  # that it lists; None: it has no list

    def queries(self) -> list[str]:
        return [row_of(request)["query"] for request in self.requests]


@contextmanager
def serve(answer: Callable[[dict], Reply] = good) -> Iterator[Endpoint]:
    endpoint = Endpoint(answer)

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with endpoint.lock:
                endpoint.requests.append(request)
                endpoint.keys.add(self.headers.get("authorization"))
                endpoint.under_way += 1
                endpoint.most_under_way = max(endpoint.most_under_way, endpoint.under_way)
            try:
                if self.path != "/v1/chat/completions":
                    status, content = 404, {"error": {"message": f"no route {self.path}"}}
                else:
                    status, content = endpoint.answer(request)
            finally:
                with endpoint.lock:
                    endpoint.under_way -= 1
            body = completion(request["model"], content) if isinstance(content, str) else content
            data = content if isinstance(content, bytes) else json.dumps(body).encode()
            try:
                self.send_response(status)
                for name, value in {**NOW, "content-type": "application/json", "content-length": len(data)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True  # the client was killed

        def do_GET(self) -> None:
            listed = [{"id": name, "object": "model", "created": 1, "owned_by": "x"} for name in endpoint.models or ()]
            data = json.dumps({"object": "list", "data": listed}).encode()
            self.send_response(404 if endpoint.models is None or self.path != "/v1/models" else 200)
            for name, value in {"content-type": "application/json", "content-length": len(data)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

    with serving(Handler) as address:
        endpoint.url = f"{address}/v1"
        yield endpoint


def completion(model: str, content: str) -> dict:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }
