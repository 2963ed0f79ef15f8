"""The run folder: names and paths of all its files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tell.errors import TellError, first_line
from tell.files import DAMAGED, read_json, write_json

Content = TypeVar("Content", bound=BaseModel)


@contextmanager
def reading(root: Path) -> Iterator[None]:
    """Report damaged files of a run in one line, whichever exception they cause.

    Raises:
        TellError: replaces any exception that damaged values cause.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise TellError(
            f"has damaged files ({type(error).__name__}: {first_line(error)})",
            where=str(root),
            remedy=DAMAGED,
        ) from error


class AdapterFolder:
    """Paths of one trained adapter; peft reads the folder too."""

    def __init__(self, root: str | Path) -> None:
        self.root = root = Path(root)
        self.weights = root / "adapter_model.safetensors"
        self.config = root / "adapter_config.json"
        self.notes = root / "tell.json"  # anchor and base model, for use elsewhere
        self.checkpoint = root / "checkpoint"  # of a training run that is not finished
        self.targets = root / "targets.safetensors"  # of its general rows, where these are distilled
        self.result = root / "result.json"  # of a finished one
        self.failed = root / "failed.json"  # of one that diverged


class RunFolder:
    """Paths of one run. Creating the object touches nothing on disk."""

    def __init__(self, root: str | Path) -> None:
        self.root = root = Path(root)
        self.config = root / "run.yaml"
        self.anchor = root / "anchor.json"
        self.schema = root / "schema.json"
        self.constraint = root / "constraint.json"  # of constrained answers, where an arm has any
        self.split = root / "split.json"
        self.plan = root / "plan.json"
        self.manifest = root / "manifest.parquet"
        self.adapter = root / "adapter"
        self.nearest = root / "nearest.npz"  # the general rows ranked, where they are
        self.written = root / "written.json"  # where the model writes rows: which engine wrote them
        self.readout = root / "readout.safetensors"
        self.search = root / "search.json"
        self.searching = root / "search"  # trials of a search that is not finished
        self.metrics = root / "metrics.json"
        self.findings = root / "findings.json"
        self.predictions = root / "predictions"
        self.answering = root / "answering.json"  # the first answers, while an arm answers the test rows
        self.logs = root / "logs"
        self.report = root / "report.html"
        self.pseudo = root / "pseudo"
        self.added = root / "added.json"  # of a run that `tell add` made
        self.status = root / "status.json"
        self.arms = root / "arms"
        self.made = tuple(path for name, path in vars(self).items() if name != "root")
        """Every file and folder that a run may make at the top of its folder."""
        self.rows = root / "rows"  # of `tell add`: rows and unlabelled prompts; read as the task's files
        self.lock = root / ".lock"  # locked by the process that is working on the run
        self.starting = root / ".starting"  # exists while a run starts: the folder is ours, but not yet a run

    ASIDE = ".old-"
    """Prefix of the folder that keeps the files of a run while another replaces it."""

    def adapter_of(self, arm: str) -> AdapterFolder:
        """The adapter that a trained arm writes."""
        return AdapterFolder(self.adapter if arm == "tell" else self.arms / arm)

    def prediction(self, arm: str) -> Path:
        """Answers of one arm: ``predictions/<arm>.jsonl``."""
        return self.predictions / f"{arm}.jsonl"

    def decoded(self, arm: str) -> Path:
        """How the answers of one arm were decoded: ``predictions/<arm>.json``."""
        return self.predictions / f"{arm}.json"

    def evaluated(self, arm: str) -> Path:
        """Answers of one arm in `tell eval`: ``predictions/eval/<arm>.jsonl``."""
        return self.predictions / "eval" / f"{arm}.jsonl"

    @property
    def endpoint_answers(self) -> Path:
        """Answers of servers in `tell eval --endpoint`, by content of the request: ``predictions/endpoints.jsonl``."""
        return self.predictions / "endpoints.jsonl"

    def before(self, arm: str) -> Path:
        """Answers of an arm of the run that `tell add` started from: ``predictions/before/<arm>.jsonl``."""
        return self.predictions / "before" / f"{arm}.jsonl"

    def general_losses(self, arm: str) -> Path:
        """Losses of an arm's weights on general rows: ``predictions/general/<arm>.jsonl``."""
        return self.predictions / "general" / f"{arm}.jsonl"

    def benchmark(self, arm: str, task: str) -> Path:
        """Answers of one arm to a benchmark's questions, without suffix: rows in ``.jsonl``, settings in ``.json``."""
        return self.predictions / "benchmarks" / arm / task

    def losses(self, arm: str) -> Path:
        """Per-step training log of one arm: ``logs/<arm>.jsonl``."""
        return self.logs / f"{arm}.jsonl"

    def pseudo_labels(self, teacher: str) -> Path:
        """Unlabelled prompts with a teacher's answers and their weights: ``pseudo/<teacher>.jsonl``."""
        return self.pseudo / f"{teacher}.jsonl"

    def pseudo_manifest(self, arm: str) -> Path:
        """The manifest of an arm with pseudo-labelled rows: ``pseudo/<arm>.parquet``."""
        return self.pseudo / f"{arm}.parquet"

    def separation(self, kind: str) -> Path:
        """Results of `tell separate`: ``json``, ``svg`` or ``png``."""
        return self.root / f"separation.{kind}"

    def set_status(self, state: str, **more: object) -> None:
        """``running``, ``interrupted``, ``failed`` or ``done``, with further facts."""
        write_json(self.status, {"state": state, **more})

    def read_status(self) -> dict:
        """status.json; empty where there is none, or none that can be read."""
        try:
            found = read_json(self.status, remedy=DAMAGED)
        except (TellError, FileNotFoundError):
            return {}
        seconds = found.get("seconds", 0)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            del found["seconds"]
        return found

    def read(self, path: Path) -> dict[str, Any]:
        """A JSON file of the run.

        Raises:
            TellError: it is missing or damaged.
        """
        return read_json(self.require(path, "`tell tune`"), remedy=DAMAGED)

    def read_as(self, path: Path, model: type[Content]) -> Content:
        """A JSON file of the run, validated by `model`.

        Raises:
            TellError: it is missing or damaged.
        """
        try:
            return model.model_validate(self.read(path))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise TellError(f"is damaged ({key}: {first['msg']})", where=str(path), remedy=DAMAGED) from error

    def require(self, path: Path, verb: str) -> Path:
        """``path`` if it exists, else the error that says which verb makes it."""
        if not path.exists():
            raise TellError(
                f"has no {path.relative_to(self.root)}",
                where=str(self.root),
                remedy=f"Name the folder of a finished run, or make one with {verb}.",
            )
        return path
