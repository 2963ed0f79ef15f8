"""`tell export --to hub`, against a small local server that speaks the hub's protocol."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

import tell
from http_server import QuietHandler, serving
from run.runs import EXAMPLES
from tell.errors import TellError
from tell.files import read_jsonl

TOKEN = "hf_secretsecret"


class FakeHub:
    """What was created and committed.

    Attributes:
        taken: repositories that exist already.
        private: of each new repository.
        files: of the commits, by path.
    """

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.broken = False


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    state = FakeHub()

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status: int, body: object, **headers: str) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"content-type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_GET(self) -> None:
            if state.broken or self.headers.get("authorization") != f"Bearer {TOKEN}":
                self.reply(401, {"error": f"bad token {TOKEN}"})
            elif self.path.startswith("/api/whoami"):
                self.reply(200, {"name": "me", "type": "user"})
            elif (name := self.path.removeprefix("/api/models/").partition("?")[0]) in state.taken:
                self.reply(200, {"id": name, "siblings": [], "private": True, "sha": "a" * 40})
            else:
                self.reply(404, {"error": "no"}, x_error_code="RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.path == "/api/repos/create":
                given = json.loads(body)
                name = f"{given.get('organization') or 'me'}/{given['name']}"
                visible = given.get("visibility")
                state.private[name] = given.get("private") if visible is None else visible == "private"
                self.reply(200, {"url": f"{constants.ENDPOINT}/{name}", "name": name, "id": "1"})
            elif self.path == "/api/validate-yaml":
                self.reply(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.reply(200, {"files": files})
            elif "/commit/" in self.path:
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        state.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.reply(
                    200, {"success": True, "commitOid": "b" * 40, "commitUrl": f"{constants.ENDPOINT}/c/{'b' * 40}"}
                )
            else:
                self.reply(404, {"error": self.path})

    with serving(Handler) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state


def options(**more) -> tell.ExportOptions:
    return tell.ExportOptions(repo="me/it", **more)


@pytest.mark.parametrize("public", [False, True])
def test_a_private_repository_without_a_row(public, hub, finished, tmp_path):
    run = finished("llama", "reviews")
    made = tell.export(run.root, "hub", out=tmp_path / "hub", options=options(merged=True, public=public))
    assert made["check"]["passed"] and hub.private == {"me/it": not public}
    assert made["next"] == [f"{'public' if public else 'private'}: {constants.ENDPOINT}/me/it"]
    assert {"README.md", "model.safetensors", "chat_template.jinja"} <= set(
        hub.files
    ) and "export.json" not in hub.files
    rows = [row for name in ("train", "test") for row in read_jsonl(EXAMPLES / f"reviews/{name}.jsonl")]
    texts = [data for path, data in hub.files.items() if not path.endswith(".safetensors")]
    assert not any(row["text"].encode() in data for row in rows for data in texts)
    assert not any(str(run.root).encode() in data or str(tmp_path).encode() in data for data in texts)


def test_what_is_not_uploaded(hub, finished, tmp_path, monkeypatch):
    run = finished("llama", "reviews")
    out = tmp_path / "x"

    def refused(said: str, given: tell.ExportOptions) -> None:
        with pytest.raises(TellError, match=said) as error:
            tell.export(run.root, "hub", out=out, options=given)
        assert TOKEN not in str(error.value)
        assert not hub.private and not hub.files and list(tmp_path.iterdir()) == []

    refused("no repository is no name", tell.ExportOptions())
    refused("which nobody can load the adapter onto.*--merged", options())
    hub.taken.add("me/it")
    refused("exists on the hub", options(merged=True))
    hub.taken.clear()
    hub.broken = True
    refused("hub refused or did not answer", options(merged=True))


def test_nothing_that_differs_is_published(hub, finished, tmp_path, monkeypatch):
    from tell.anchor.anchor import NO_ANCHOR
    from tell.exports.target import Source, with_anchor

    monkeypatch.setattr(Source, "template", lambda self, **_: with_anchor(self.chat.template, NO_ANCHOR))
    made = tell.export(finished("llama", "reviews").root, "hub", out=tmp_path / "x", options=options(merged=True))
    assert made["check"]["passed"] is False and not hub.private and made["next"] == []
