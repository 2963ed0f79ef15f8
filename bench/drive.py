"""Start workers and talk to them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tell.errors import TellError

ROOT = Path(__file__).resolve().parent.parent
ANSWER_SECONDS = 1800.0


class Worker:
    """A process of one engine.

    Args:
        name: for messages.
        module: of `bench.engines`.
        spec: written to ``folder`` for it to read.
        folder: for its specification and log.
        python: interpreter of its environment.
    """

    def __init__(
        self, name: str, module: str, spec: dict[str, Any], folder: Path, *, python: str | None = None
    ) -> None:
        self.name = name
        number = len(list(folder.glob(f"{name}-*.json")))
        path = folder / f"{name}-{number}.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        self.log = path.with_suffix(".log")
        environment = {**os.environ, "PYTHONPATH": python_path(own=python is None), **QUIET}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python or sys.executable, "-m", "bench.worker", module, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                cwd=folder,
            )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def tell(self, **message: Any) -> None:
        """Send without waiting for an answer."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; the answer that is then missing says why

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send and wait for the answer; raises as `answer` does."""
        self.tell(**message)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            TellError: the engine failed, ended, or did not answer within half an hour.
        """
        try:
            line = self.answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            self.close(kill=True)
            raise TellError(f"no answer within {ANSWER_SECONDS:.0f} s", where=self.name) from None
        answer = json.loads(line) if line else {"error": self._ending()}
        if "error" in answer:
            raise TellError(answer["error"], where=self.name, remedy=f"Read {self.log}.")
        return answer

    def _ending(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "killed, as systems do when memory runs out"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"ended with status {code}: {lines[-1] if lines else 'without a word'}"

    def close(self, *, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        elif self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()  # an end of input stops the worker at its next command
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def python_path(*, own: bool) -> str:
    """Where a worker finds modules; in our own interpreter also what the caller's path holds (wheels without pip)."""
    given = os.environ.get("PYTHONPATH", "")
    paths = [str(ROOT), str(ROOT / "src"), *filter(None, given.split(os.pathsep))] if own else [str(ROOT)]
    return os.pathsep.join(paths)


QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "DISABLE_VERSION_CHECK": "1",  # LLaMA-Factory pins libraries tightly; what is installed is reported instead
    "PYTHONUNBUFFERED": "1",
}


def say(text: str) -> None:
    """Progress, on stderr: stdout may be JSON."""
    print(text, file=sys.stderr, flush=True)
