"""`tell add`: a run made again with more rows, and compared with the one before on the same test rows."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pydantic import BaseModel

from tell.config import Config, make_config
from tell.data.example import Example
from tell.data.form import Form
from tell.data.grow import Grown, grow
from tell.data.sources import load
from tell.data.split import PARTS, Splits
from tell.data.unlabelled import load_prompts_of
from tell.data.write_examples import write_examples, write_prompts
from tell.errors import TellError
from tell.files import read_jsonl, write_json, write_jsonl
from tell.folder import RunFolder
from tell.nested import merge
from tell.progress import Display, Silent
from tell.report.arm_rows import ArmRows, Key, Rescore, keyed, rescorer
from tell.report.read_run import mapping, read_run
from tell.rows.ends import without_ends
from tell.run.answers import adapter_ready
from tell.run.claim import Trust, check_trust, claim, read_run_config, with_full_paths
from tell.run.task_rows import FEW_ROWS
from tell.run.tune import tune
from tell.score.intervals import estimate
from tell.score.means import mean_metric
from tell.shown import left_out
from tell.verbs.evaluate import Findings, Split, exam_of, lists_labels, pick_rows, rows_by_hash, run_shots
from tell.verbs.open_run import OpenRun, open_run
from tell.verbs.plan_run import plan

Start = Literal["new", "resume", "overwrite"]


class AddedRows(BaseModel):
    """rows/added.json: what `tell add` read and how it was split."""

    run: str
    data: str
    old: dict[str, int]
    new: dict[str, int]
    repeated: int
    bound: int


class _Data(BaseModel):
    """``data`` of findings.json."""

    columns: dict[str, str] = {}


class _Findings(BaseModel):
    """The part of findings.json that says which columns were read."""

    data: _Data


@dataclass(frozen=True)
class Addition:
    """A grown task, before it is written.

    Attributes:
        prompts: the old run's ``task.unlabelled``, as it read them: the grown rows have other columns.
    """

    opened: OpenRun
    data: str
    grown: Grown
    prompts: Sequence[Example] | None = None

    @property
    def facts(self) -> AddedRows:
        new = {name: len(rows) for name, rows in self.grown.new.items()}
        old = {name: len(getattr(self.grown.parts, name)) - new[name] for name in PARTS}
        run = str(self.opened.folder.root.resolve())
        return AddedRows(
            run=run, data=self.data, old=old, new=new, repeated=self.grown.repeated, bound=self.grown.bound
        )

    def write(self, folder: RunFolder) -> Config:
        """Write the rows into the folder of the new run, and return its configuration."""
        parts = self.grown.parts
        for name in PARTS:
            write_examples(folder.rows / f"{name}.jsonl", getattr(parts, name))
        if self.prompts is not None:
            write_prompts(folder.rows / "unlabelled.jsonl", self.prompts)
        write_json(folder.rows / "added.json", self.facts.model_dump())
        return self.config(folder)

    def config(self, folder: RunFolder) -> Config:
        """The old run's configuration over the grown rows: all training rows, all test rows, the same kind of task."""
        old, held = self.opened.config, bool(self.grown.parts.validation)
        kind = self.opened.folder.read_as(self.opened.folder.findings, Findings).kind.name
        files = {key: str(folder.rows / f"{name}.jsonl") for key, name in (("data", "train"), ("test", "test"))}
        task = {
            **files,
            "validation": str(folder.rows / "validation.jsonl") if held else None,
            "unlabelled": str(folder.rows / "unlabelled.jsonl") if self.prompts is not None else None,
            **({} if held else {"validation_fraction": 0.0}),
            **dict.fromkeys(("columns", "prompt", "rows", "tokens", "test_rows")),
            "answer": (),
            "kind": kind if old.task.kind == "auto" else old.task.kind,
        }
        keys = merge(old.model_dump(by_alias=True, mode="json"), {"task": task, "out": str(folder.root)})
        return make_config(keys, where=str(self.opened.folder.config))


def add(
    run: str | Path,
    data: str | Path,
    *,
    out: str | Path | None = None,
    start: Start = "new",
    trust: Trust = Trust(),  # noqa: B008  (frozen)
    display: Display | None = None,
    command: str = "",
) -> RunFolder:
    """A new run on a run's rows and more, compared with the old one.

    Old rows stay in their parts; new ones are split by seed and content, copies of old ones are dropped. The new run
    has the old one's settings, and no budget of rows. Its ``added.json`` compares both runs, paired, on the old test
    rows and on the new ones.

    Args:
        run: a finished run folder; its data files must be as they were.
        data: the new rows, in the layout of the run's data. A whole new copy of the data will do.
        out: the new run's folder; default: the old one's name with the next free number.
        start: "resume" continues an interrupted addition in ``out``, "overwrite" replaces the run there.
        trust: third-party code that may run. The folder may be somebody else's, so run.yaml alone does not allow it.
        display: shows progress.
        command: kept in the report.

    Returns:
        The new run's folder.

    Raises:
        TellError: no such run, its rows are gone, no new row, ``out`` is in the old run, or what `tell.tune` refuses.
        Interrupted: SIGINT or SIGTERM; the folder can be resumed.
    """
    display = display or Silent()
    opened = open_run(run, trust_remote_code=trust.code)
    check_trust(opened.folder, opened.config, code=trust.code, scorer=trust.scorer)
    if start == "resume":
        config = _resumed(opened, out)
        check_trust(RunFolder(str(out)), config, code=trust.code, scorer=trust.scorer)
        folder = tune(config, resume=True, display=display, command=command)
    else:
        addition = read_addition(opened, data, display)
        folder = RunFolder(out or _next(opened.folder.root))
        _check_apart(folder.root, opened.folder.root)
        claim(addition.config(folder), resume=False, overwrite=start == "overwrite")
        folder = _tune(addition, folder, overwrite=start == "overwrite", display=display, command=command)
    write_json(folder.added, compare_runs(opened, folder, display))
    return folder


def plan_addition(
    run: str | Path,
    data: str | Path,
    *,
    trust: Trust = Trust(),  # noqa: B008  (frozen)
    display: Display | None = None,
) -> dict:
    """The plan of `add`, as `tell.plan`, with ``added``: what the split of the new rows came to.

    Raises:
        TellError: as `add`.
    """
    display = display or Silent()
    opened = open_run(run, trust_remote_code=trust.code)
    check_trust(opened.folder, opened.config, code=trust.code, scorer=trust.scorer)
    addition = read_addition(opened, data, display)
    with TemporaryDirectory() as place:
        config = addition.write(RunFolder(place))
        return {**plan(config, display=display), "added": addition.facts.model_dump()}


def read_addition(opened: OpenRun, data: str | Path, display: Display) -> Addition:
    """The old run's rows by part, and the new rows split.

    Raises:
        TellError: rows of the run are gone, the file is invalid, or it has no new row.
    """
    config = opened.config
    task, hashes = config.task, opened.folder.read_as(opened.folder.split, Split)
    by_hash = rows_by_hash(opened, (task.data, task.test, task.validation))
    old = {name: pick_rows(getattr(hashes, name), by_hash, task.data, name) for name in PARTS}
    given = load(str(data), name="task", columns=opened.read_by, lists=lists_labels(opened))
    for notice in (*left_out(given.dropped), *given.notices):
        display.note(notice)
    more = without_ends(given.examples, opened.chat)[0]
    share = task.validation_fraction if old["validation"] or len(old["train"]) + len(more) >= FEW_ROWS else 0.0
    grown = grow(
        Splits(**old, exact_duplicates=0),
        more,
        seed=config.seed,
        test_fraction=task.test_fraction,
        validation_fraction=share,
    )
    if not any(grown.new.values()):
        what = f"all of its {len(more):,} rows are already in {opened.folder.root}"
        raise TellError(what, where=str(data), remedy="Give a file with new rows.")
    addition = Addition(opened, str(data), grown, _old_prompts(opened, display))
    for text in describe_addition(addition.facts):
        display.note(text)
    return addition


def _old_prompts(opened: OpenRun, display: Display) -> Sequence[Example] | None:
    """The prompts of the run's ``task.unlabelled``, by the run's own columns; None where it has none."""
    path, read_by = opened.config.task.unlabelled, opened.read_by
    if path is None:
        return None
    columns = opened.folder.read_as(opened.folder.findings, _Findings).data.columns
    found = load_prompts_of(path, columns, read_by if isinstance(read_by, Form) else None)
    for text in (*found.notices, *left_out(found.dropped)):
        display.note(text)
    return found.examples


def describe_addition(facts: AddedRows) -> list[str]:
    """What was dropped and where the new rows went, in sentences."""
    new = ", ".join(f"{count:,} {name}" for name, count in facts.new.items())
    lines = [f"new rows: {new} (the run had {', '.join(f'{n:,} {name}' for name, n in facts.old.items())})"]
    if facts.repeated:
        lines.append(f"{facts.repeated:,} rows are left out: the run has them already")
    if facts.bound:
        lines.append(f"{facts.bound:,} new rows have the prompt of an old row and stay in its part")
    if not facts.new["test"]:
        lines.append("no new row is a test row, so the runs are compared on the old test rows alone")
    return lines


def _next(root: Path) -> Path:
    """``<old run>-<n>`` with the first free n, from 2; a run that has a number counts on."""
    name, dash, number = root.resolve().name.rpartition("-")
    stem, n = (name, int(number) + 1) if dash and number.isdecimal() and len(number) < 5 else (root.resolve().name, 2)
    while (root.resolve().parent / f"{stem}-{n}").exists():
        n += 1
    return root.parent / f"{stem}-{n}" if root.name else root.resolve().parent / f"{stem}-{n}"


def _check_apart(out: Path, old: Path) -> None:
    """Refuse a new run in the old one's folder: it is to be compared with it.

    Raises:
        TellError: ``out`` is the old run, or a folder in it.
    """
    if out.resolve().is_relative_to(old.resolve()):
        what = "is the run to which rows are added" if out.resolve() == old.resolve() else f"is in the run {old}"
        raise TellError(what, where=f"--out {out}", remedy="Choose another --out; the old run stays as it is.")


def _resumed(opened: OpenRun, out: str | Path | None) -> Config:
    """The configuration of an interrupted addition."""
    if out is None:
        raise TellError("--resume needs the folder to resume", where="tell add", remedy="Name it with --out.")
    folder = RunFolder(out)
    config = read_run_config(folder)
    facts = folder.read_as(folder.require(folder.rows / "added.json", "`tell add`"), AddedRows)
    if Path(facts.run) != opened.folder.root.resolve():
        remedy = f"Resume it as `tell add {facts.run} {facts.data} --out {out} --resume`."
        raise TellError(f"was made from {facts.run}, not from {opened.folder.root}", where=str(out), remedy=remedy)
    return config


def _tune(addition: Addition, folder: RunFolder, *, overwrite: bool, display: Display, command: str) -> RunFolder:
    """The new run; where it is refused before it begins, nothing is left of its rows."""
    fresh = not folder.root.exists()
    folder.root.mkdir(parents=True, exist_ok=True)
    if not folder.config.exists():
        folder.starting.touch()  # the folder is ours from now on, see `tell.run.claim`
    try:
        config = with_full_paths(addition.write(folder))
        return tune(config, overwrite=overwrite, display=display, command=command)
    except BaseException:
        if not folder.config.exists():
            shutil.rmtree(folder.rows, ignore_errors=True)
            folder.starting.unlink(missing_ok=True)
            if fresh:
                with suppress(OSError):
                    folder.root.rmdir()
        raise


def compare_runs(opened: OpenRun, folder: RunFolder, display: Display) -> dict:
    """added.json: both runs on the old and on the new test rows, the new one minus the old one, paired.

    The old run's answers are those it kept; its adapter answers the other test rows now. Both are scored as the new
    run scores.
    """
    new = read_run(folder)
    facts = folder.read_as(folder.rows / "added.json", AddedRows)
    common = [arm for arm in mapping(new.metrics, "arms") if adapter_ready(opened.folder, arm)]
    if not common:
        return {**facts.model_dump(), "arm": None}
    arm = "tell" if "tell" in common else common[0]
    score = rescorer(new)
    theirs = _scored_rows([*_answers(opened.folder.prediction(arm)), *_answered(opened, folder, arm, display)], score)
    ours = _scored_rows(new.predictions.get(arm, []), score)
    keys = ours.shared(theirs)
    before = set(opened.folder.read_as(opened.folder.split, Split).test)
    sides = {"old_test": [k for k in keys if k[0] in before], "new_test": [k for k in keys if k[0] not in before]}
    names = [name for name in ours.metrics if name in theirs.metrics]
    compared = {side: _numbers(ours, theirs, names, chosen) for side, chosen in sides.items() if chosen}
    return {**facts.model_dump(), "arm": arm, "primary": mapping(new.metrics, "task").get("primary"), **compared}


def _numbers(ours: ArmRows, theirs: ArmRows, names: Iterable[str], keys: list[Key]) -> dict:
    return {
        name: {
            "new": estimate(ours.over(name, keys), seed=0),
            "old": estimate(theirs.over(name, keys), seed=0),
            "difference": ours.minus(theirs, name, keys),
        }
        for name in names
    }


def _scored_rows(rows: list[dict], score: Rescore) -> ArmRows:
    """Answers with their metrics, scored again; a user's own scorer has left its scores on the rows."""
    found = dict(score(rows))
    if not found:
        names = dict.fromkeys(name for row in rows for name in mapping(row, "scores"))
        found = {n: mean_metric([mapping(row, "scores").get(n, float("nan")) for row in rows]) for n in names}
    return ArmRows(keyed(rows), found)


def _answers(path: Path) -> list[dict]:
    return read_jsonl(path) if path.exists() else []


def _answered(opened: OpenRun, folder: RunFolder, arm: str, display: Display) -> list[dict]:
    """The old adapter's answers to test rows of the new run that it has not answered; kept for a resumed addition."""
    path = folder.before(arm)
    if path.exists():
        return read_jsonl(path)
    known = {row.get("hash") for row in _answers(opened.folder.prediction(arm))}
    test = load(str(folder.rows / "test.jsonl"), name="task").examples
    todo = [e for e in without_ends(test, opened.chat)[0] if e.hash not in known]
    if not todo:
        return []
    session = opened.session(opened.config, display, stream=opened.decides(opened.config))
    facts = opened.folder.read_as(opened.folder.findings, Findings)
    seed = opened.config.seed
    exam = exam_of(opened, session, seed, facts, test=todo, train=[], shots=run_shots(opened))
    with session.adapter(opened.adapter(arm)):
        rows = replace(exam, chosen=opened.chosen).take(arm, session).rows
    write_jsonl(path, rows)
    return rows
