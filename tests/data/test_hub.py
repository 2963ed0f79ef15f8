"""Hub names, against a small local server that speaks the hub's protocol, and with no hub at all."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

SHA = "a" * 40
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "train.jsonl": b'{"prompt": "q1", "completion": "a"}\n{"prompt": "q2", "completion": "b"}\n',
    "test.jsonl": b'{"prompt": "q3", "completion": "c"}\n',
}
NOWHERE = "http://127.0.0.1:9"  # refuses connections


class Hub(http.server.BaseHTTPRequestHandler):
    def answer(self):
        path = self.path.partition("?")[0]
        if path == "/":
            self.reply(b"hub")
        elif "/acme/tickets" not in path:
            self.reply(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            name = path.rpartition("/")[2]
            if name in FILES:
                self.reply(FILES[name], 200, {"ETag": f'"{name}"', "X-Repo-Commit": SHA})
            else:
                self.reply(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        elif "/tree/" in path:
            files = [{"type": "file", "path": f, "oid": "0" * 40, "size": len(FILES[f])} for f in FILES]
            self.reply(json.dumps(files).encode())
        else:
            info = {"id": "acme/tickets", "sha": SHA, "siblings": [{"rfilename": f} for f in FILES], "tags": []}
            self.reply(json.dumps(info).encode())

    def reply(self, body, status=200, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = answer

    def log_message(self, *_):
        pass


def load(names, home, endpoint, offline="0"):
    """What loading each name gives, from a fresh process, because the hub client reads its environment on import."""
    code = """if True:
        import json, sys
        from tell.data.sources import load
        from tell.errors import TellError
        results = []
        for name in sys.argv[1:]:
            try:
                loaded = load(name)
                results.append([loaded.layout, *([e.question, e.answer, e.origin] for e in loaded.examples)])
            except TellError as error:
                results.append(str(error))
        print(json.dumps(results))
    """
    env = os.environ | {"HF_HUB_OFFLINE": offline, "HF_HOME": str(home), "HF_ENDPOINT": endpoint}
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Retry" not in done.stderr
    return json.loads(done.stdout)


TRAIN = ["prompt/completion", ["q1", "a", "acme/tickets:1"], ["q2", "b", "acme/tickets:2"]]
TEST = ["prompt/completion", ["q3", "c", "acme/tickets@test:1"]]


def test_hub_names_splits_and_the_cache(tmp_path):
    names = ["acme/tickets", "acme/tickets@test", "acme/tickets@nope", "acme/tickets:extra", "acme/none"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        train, test, split, config, missing = load(names, tmp_path, f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert train == TRAIN and test == TEST
    assert split.startswith("acme/tickets@nope: cannot be loaded") and "['train', 'test']" in split
    assert config.startswith("acme/tickets:extra: cannot be loaded") and "Available: ['default']" in config
    assert missing.startswith("acme/none: no such file, and the hub says: Dataset 'acme/none' doesn't exist")
    # What was loaded once needs no hub any more.
    assert load(names[:1], tmp_path, NOWHERE) == [TRAIN]
    assert load(names[1:2], tmp_path, NOWHERE, offline="1") == [TEST]


@pytest.mark.parametrize(("offline", "why"), [("1", "HF_HUB_OFFLINE is set"), ("0", "refused")])
def test_unreachable_hub_is_said_without_retries(tmp_path, offline, why):
    (error,) = load(["tatsu-lab/alpaca"], tmp_path, NOWHERE, offline)
    assert error.startswith("tatsu-lab/alpaca: no such file, and the hub cannot be reached (") and why in error
