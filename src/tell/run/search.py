"""Search of an arm's settings by cross-validation over the task rows (``search.minutes``): no test row is used.

Candidates differ in learning rate and amount of general rows. They are compared by successive halving (Jamieson and
Talwalkar 2016, arXiv 1502.07943) on one fold: all are trained for half of the usual repetitions, the better half goes
on to the usual number, the best to one and a half times. A candidate is trained at half its peak rate without decay, so
that at every rung it has moved about as far as a run that decays linearly and ends there: one training serves as its
shorter versions. The best candidate then meets the usual settings on the other folds, each trained as a run would be,
and replaces them only where it gains more than the standard error of the gain. The same adapters choose how closed
fields are decided. A control is searched by the same procedure.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tell.errors import Diverged, Interrupted
from tell.files import read_jsonl, remove_folder, write_json, write_jsonl
from tell.folder import AdapterFolder
from tell.metric_names import metric
from tell.names import ARMS
from tell.number_text import show
from tell.run.arms import REPEAT
from tell.run.folds import Fold, folds_of, pooled
from tell.run.journal import Journal
from tell.run.measure import run_exam
from tell.run.prepare import Prepared
from tell.run.readouts import Decider, fit_readout
from tell.run.search_record import GENERAL, RATE, SearchedArm, SearchRecord
from tell.run.session import Session
from tell.run.train_arms import arm_targets
from tell.score.intervals import Z, difference
from tell.score.scored import Metric, primary_of

CANDIDATES = ((1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (1.0, 1 / 3))  # times the usual learning rate, general rows
RUNGS = (0.5, 1.0, 1.5)  # times the usual repetitions
DECODINGS: tuple[dict[str, object], ...] = (
    {"generate.closed": "off"},
    {"generate.closed": "likelihood"},
    {"generate.closed": "fused", "generate.readout_weight": 1.0},
    {"generate.closed": "fused", "generate.readout_weight": 10.0},
    {"generate.closed": "readout"},
)
EXPLORED = 0.5  # share of the time for the first fold: a choice that is not confirmed on another one changes nothing
MOST_FORGOTTEN = 0.02  # nats a token above the untuned model's loss on held-out general rows


def searched(prepared: Prepared, session: Session, journal: Journal) -> Prepared:
    """The run with the settings that a search chooses for its arms; a resumed run keeps those found before.

    Raises:
        Interrupted: a signal was received; what was answered so far is kept.
    """
    minutes = prepared.task.config.search.minutes
    arms = [arm for arm in prepared.trained if ARMS[arm].searched]
    if minutes is None or not arms:
        return prepared
    folder = journal.folder
    record = folder.read_as(folder.search, SearchRecord) if folder.search.exists() else SearchRecord()
    folds = folds_of(prepared, prepared.task.config.search.folds)
    for arm in arms:
        if arm not in record.arms:
            journal.at(f"search {arm}")
            record.arms[arm] = _Search(prepared, arm, folds, session, journal, 60 * minutes).run()
            write_json(folder.search, record.model_dump())
        prepared.task.notices.add(f"search, {arm}: {record.arms[arm].why}")
    remove_folder(folder.searching)
    return replace(prepared, chosen={arm: found.chosen for arm, found in record.arms.items()})


@dataclass(frozen=True)
class Candidate:
    """Settings to try; ``general`` is a share of the run's general rows."""

    rate: float
    repeat: int
    general: float = 1.0

    def named(self, fold: Fold, *, decayed: bool) -> str:
        return f"{'run' if decayed else 'rung'}-{fold.number}-{self.rate:g}-{self.general:.3g}-{self.repeat}"


@dataclass
class _Search:
    """One arm's search. ``limit`` in seconds: what is predicted to end later is not begun."""

    prepared: Prepared
    arm: str
    folds: list[Fold]
    session: Session
    journal: Journal
    limit: float
    begin: float = field(default_factory=time.monotonic)
    tried: list[dict[str, Any]] = field(default_factory=list)
    pace: list[tuple[int, float]] = field(default_factory=list)  # rows trained, and seconds with their answers
    answering: float = 0.0  # seconds of the last answers to the rows of a fold
    found: dict[str, Metric] = field(default_factory=dict)  # of the runs on folds, by name
    primary: str = ""  # the metric, once a row is answered
    deciders: dict[int, Decider | None] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)  # on held-out general rows; of the untuned model under ""

    def run(self) -> SearchedArm:
        if len(self.folds) < 2:
            return self._done({}, "nothing is searched: the rows cannot be divided into folds that share their labels")
        best = self._halving()
        if best is None:
            return self._done({}, f"{self.limit / 60:g} minutes are too short to compare two candidates")
        settings, why = self._confirmed(best)
        decoding, more = self._decoding(settings)
        chosen: dict[str, object] = {} if settings == self.usual else self._keys(settings)
        return self._done(chosen | decoding, f"{why}; {more}" if more else why)

    def _done(self, chosen: Mapping[str, Any], why: str) -> SearchedArm:
        seconds = round(time.monotonic() - self.begin, 1)
        return SearchedArm(chosen=dict(chosen), metric=self.primary, tried=self.tried, why=why, seconds=seconds)

    @property
    def usual(self) -> Candidate:
        """The settings without a search."""
        mixture = self.prepared.mixtures[self.arm][1]
        return Candidate(float(self.prepared.task_of(self.arm).training(mixture).learning_rate or 0), mixture.repeat)

    def _candidates(self) -> list[Candidate]:
        """The usual settings first. Keys that the user set, and general rows where there are none, stay."""
        config, usual = self.prepared.task.config, self.usual
        mixed = ARMS[self.arm].mixture == "mixed" and self.prepared.draw is not None and len(self.prepared.draw) >= 3
        found = [
            Candidate(usual.rate * rate, usual.repeat, general)
            for rate, general in CANDIDATES
            if (rate == 1 or config.train.learning_rate is None)
            and (general == 1 or (mixed and config.general.by_task and config.general.ratio is None))
        ]
        return list(dict.fromkeys(found))

    def _halving(self) -> Candidate | None:
        """The best candidate at its best number of repetitions, on the first fold; None: there was no time."""
        fold, usual = self.folds[0], self.usual
        fixed = self.prepared.task.config.mix.repeat is not None
        rungs = [usual.repeat] if fixed else sorted({max(1, round(usual.repeat * rung)) for rung in RUNGS})
        alive, seen, late = self._candidates(), {}, False
        for rung, repeat in enumerate(rungs):
            scores: dict[Candidate, float] = {}
            for candidate in alive:
                more = len(fold.run.table) * (repeat - (rungs[rung - 1] if rung else 0))
                if late := late or not self._time_for(more, EXPLORED):
                    break
                at = replace(candidate, repeat=repeat)
                found = self._on_rung(fold, at, rungs[-1], more)
                if found is not None:
                    scores[candidate] = seen[at] = found
            if late and rung == 0 and len(scores) < 2 and len(alive) > 1:
                return None
            ranked = sorted(scores, key=lambda candidate: -scores[candidate])  # stable: the usual settings lead ties
            alive = ranked[: -(-len(ranked) // 2)]
            if not alive:
                break
        if not seen:
            return None
        top = max(seen.values())
        best = [candidate for candidate, value in seen.items() if value == top]
        return min(best, key=lambda one: (one.rate != usual.rate, abs(one.repeat - usual.repeat)))

    def _on_rung(self, fold: Fold, candidate: Candidate, most: int, more: int) -> float | None:
        """The candidate's value after its repetitions in a training of ``most``; None where it diverged or forgot.

        Args:
            more: rows to train on since the rung before.
        """
        path = self._folder / f"{candidate.named(fold, decayed=False)}.jsonl"
        run = self._run(fold, candidate, most=most)
        place = self._folder / replace(candidate, repeat=most).named(fold, decayed=False)
        mark, begin = place / f"at-{candidate.repeat}", time.monotonic()
        if not mark.exists() and not self._train(run, place, mark, share=candidate.repeat / most):
            return None
        found, loss = self._answered(fold, run, mark, path)
        self.pace.append((more, time.monotonic() - begin))
        value = self._value(found)
        self._note(candidate, [fold], value, loss)
        return value if loss is None or loss <= self.losses[""] + MOST_FORGOTTEN else None

    def _confirmed(self, best: Candidate) -> tuple[Candidate, str]:
        """The best candidate where it beats the usual settings on the other folds, else the usual ones; and why."""
        usual, name = self.usual, metric(self.primary).phrase
        pairs: list[tuple[Metric, Metric]] = []
        for fold in self.folds[1:]:
            both = dict.fromkeys((usual, best))
            if not self._time_for(sum(len(fold.run.table) * candidate.repeat for candidate in both)):
                break
            found = [self._as_run(fold, candidate) for candidate in both]
            if any(one is None for one in found):
                break
            pairs.append((found[-1], found[0]))  # type: ignore[arg-type]  # checked above
        if best == usual:
            return usual, f"the usual settings were the best of {len(self.tried)} trials in {name}"
        if not pairs:
            return usual, "the usual settings stay: there was no time to compare them with the best on another fold"
        gain, error = self._gain([one for one, _ in pairs], [other for _, other in pairs])
        shown = show(gain, metric(self.primary).gap_unit, sign=True)
        told = f"{shown} in {name} on {len(pairs)} other {'fold' if len(pairs) == 1 else 'folds'}"
        told += f" (standard error {show(error, metric(self.primary).gap_unit)})"
        if gain > error:
            return best, f"{self._text(best)} instead of {self._text(usual)}: {told}"
        return usual, f"the usual settings stay; {self._text(best)}: {told}"

    def _as_run(self, fold: Fold, candidate: Candidate) -> Metric | None:
        """The candidate's metric on a fold, trained as a run would be; None where it diverged."""
        name = candidate.named(fold, decayed=True)
        run, place = self._run(fold, candidate), self._folder / name
        if name in self.found:
            return self.found[name]
        begin = time.monotonic()
        if not AdapterFolder(place).weights.exists() and not self._train(run, place):
            return None
        found, loss = self._answered(fold, run, place, self._folder / f"{name}.jsonl")
        self.pace.append((len(fold.run.table) * candidate.repeat, time.monotonic() - begin))
        self._note(candidate, [fold], self._value(found), loss)
        self.found[name] = found
        return found

    def _decoding(self, settings: Candidate) -> tuple[dict[str, object], str]:
        """How closed fields are decided, where another way gains more than its standard error; and why."""
        task = self.prepared.task
        if not ARMS[self.arm].decides or not task.closed or task.config.generate.closed != "fused":
            return {}, ""
        name = settings.named
        folds = [fold for fold in self.folds[1:] if name(fold, decayed=True) in self.found]
        if not folds:
            return {}, ""
        usual = [self.found[name(fold, decayed=True)] for fold in folds]
        best: tuple[float, dict[str, object], str] = (0.0, {}, "")
        for number, keys in enumerate(DECODINGS):
            found = []
            if time.monotonic() - self.begin + self.answering * len(folds) > self.limit:
                break
            for fold in folds:
                run = self._run(fold, settings, more=keys)
                path = self._folder / f"{name(fold, decayed=True)}-decoding{number}.jsonl"
                found.append(self._answered(fold, run, self._folder / name(fold, decayed=True), path)[0])
            gain, error = self._gain(found, usual)
            self.tried.append({**keys, "folds": [f.number for f in folds], "value": self._value(pooled(found))})
            if gain > max(error, best[0]):
                shown = show(gain, metric(self.primary).gap_unit, sign=True)
                how = ", ".join(f"{key} {value}" for key, value in keys.items())
                best = (gain, keys, f"{how}: {shown} (standard error {show(error, metric(self.primary).gap_unit)})")
        return best[1], best[2]

    def _run(
        self, fold: Fold, candidate: Candidate, *, most: int | None = None, more: Mapping[str, object] = {}
    ) -> Prepared:
        """The fold's run with a candidate's settings.

        Args:
            most: repetitions of a training that passes through rungs, at half the rate and without decay; None: a run.
            more: further keys.
        """
        keys = self._keys(candidate, fold) | dict(more)
        if most is not None:
            keys |= {RATE: candidate.rate / 2, REPEAT: most, "train.schedule": "constant"}
            if (draw := fold.run.draw) is not None and len(draw) and ARMS[self.arm].mixture == "mixed":
                # among as many general rows for each repetition as the usual run has
                keys[GENERAL] = max(1, round(candidate.general * len(draw) * most / self.usual.repeat))
        keys["train.checkpoint_every"] = 0
        return replace(fold.run, chosen={self.arm: keys})

    def _keys(self, candidate: Candidate, fold: Fold | None = None) -> dict[str, object]:
        """The configuration's keys of a candidate, of a fold or of the whole run."""
        keys: dict[str, object] = {RATE: candidate.rate, REPEAT: candidate.repeat}
        draw = (self.prepared if fold is None else fold.run).draw
        if ARMS[self.arm].mixture == "mixed" and draw is not None and len(draw) and candidate.general != 1:
            keys[GENERAL] = max(1, round(candidate.general * len(draw)))
        return keys

    def _train(self, run: Prepared, place: Path, mark: Path | None = None, share: float = 1.0) -> bool:
        """Train to a share of the steps, from where an earlier rung stopped.

        Args:
            mark: receives a copy of the adapter at that step; None: the whole training, whose adapter is in ``place``.

        Returns:
            False: it diverged.

        Raises:
            Interrupted: a signal was received.
        """
        from tell.train.trainer import Trainer
        from tell.train.training_job import TrainingHooks, TrainingJob

        tables, mixture = run.mixtures[self.arm]
        task = run.task_of(self.arm)
        steps = mixture.steps(task.config.train.batch_size)
        end = max(1, round(share * steps))
        done = 0

        def progress(report: Any) -> None:
            nonlocal done
            done = report.step
            advance(1, f"loss {report.loss:.3f}")

        def stopped() -> bool:
            return self.journal.stop() or (mark is not None and done >= end)

        targets = arm_targets(task, mixture, self.session, self._folder / "targets.safetensors")
        settings, seed = task.training(mixture).model_copy(update={"report_to": ()}), task.config.seed
        job = TrainingJob(tables, mixture, settings, seed, place, place / "log.jsonl", targets)
        hooks = TrainingHooks(stopped=stopped, progress=progress, marks={end: mark} if mark else {})
        with self.session.display.bar(f"search {self.arm}: {place.name}", end, "steps") as advance:
            try:
                Trainer(self.session.model, job, device=self.session.loaded.device, hooks=hooks).run(resume=True)
            except Diverged:
                return False
            except Interrupted as error:
                if mark is None or done < end:
                    raise self.journal.stop.interrupted(f"search {self.arm}: {error.what}") from error
        return True

    def _answered(self, fold: Fold, run: Prepared, adapter: Path, path: Path) -> tuple[Metric, float | None]:
        """The metric of an adapter's answers to the held-out rows, and its loss on held-out general rows."""
        if fold.number not in self.deciders:
            decides = ARMS[self.arm].decides and fold.run.task.decides
            readout = fit_readout(fold.run.task, self.session) if decides else None
            self.deciders[fold.number] = Decider.of(readout, self.session) if readout is not None else None
        exam = run_exam(run, self.session, self.deciders[fold.number])
        self._general_loss("")
        kept, loss, begin = (read_jsonl(path) if path.exists() else None), None, time.monotonic()
        with self.session.adapter(adapter):
            answers = exam.take(self.arm, self.session, kept)
            loss = self._general_loss(str(adapter))
        self.answering = time.monotonic() - begin
        write_jsonl(path, answers.rows)
        self.primary = primary_of(exam.scorer, [answers.metrics])
        return answers.metrics[self.primary], loss

    def _general_loss(self, weights: str) -> float | None:
        """Mean loss on held-out general rows with the applied weights, measured once; None without general rows."""
        from tell.train.row_losses import row_losses

        general = self.prepared.general
        if ARMS[self.arm].mixture != "mixed" or general is None or not len(general.held_out):
            return None
        if weights not in self.losses:
            losses = row_losses(self.session.model, general.table, [int(i) for i in general.held_out])
            self.losses[weights] = float(np.mean(losses))
        return self.losses[weights]

    def _gain(self, left: Sequence[Metric], right: Sequence[Metric]) -> tuple[float, float]:
        """How much better the first is than the second over the same folds, and the standard error."""
        found = difference(pooled(left), pooled(right), seed=self.prepared.task.config.seed)
        sign = 1 if metric(self.primary).higher_is_better else -1
        low, high = found["ci"]
        return sign * found["value"], (high - low) / (2 * Z)

    def _value(self, found: Metric) -> float:
        """Higher is better."""
        return found.value if metric(self.primary).higher_is_better else -found.value

    def _note(self, candidate: Candidate, folds: Sequence[Fold], value: float, loss: float | None) -> None:
        entry: dict[str, Any] = {RATE: candidate.rate, REPEAT: candidate.repeat, "general": candidate.general}
        entry |= {"folds": [fold.number for fold in folds], "value": round(value, 6)}
        self.tried.append(entry | ({} if loss is None else {"general_loss": round(loss, 4)}))
        shown = show(value, metric(self.primary).unit)
        self.session.display.note(f"search {self.arm}: {self._text(candidate)}, fold {folds[0].number + 1}: {shown}")

    def _text(self, candidate: Candidate) -> str:
        general = "" if candidate.general == 1 else f", {candidate.general:.2g} of the general rows"
        return f"learning rate {candidate.rate:.2g}, {candidate.repeat} times{general}"

    def _time_for(self, rows: int, share: float = 1.0) -> bool:
        """Whether training on so many further rows is predicted to end within a share of the time."""
        self.journal.stop.check()
        spent = time.monotonic() - self.begin
        if not self.pace:
            return spent < share * self.limit
        seconds = sum(s for _, s in self.pace) / max(1, sum(n for n, _ in self.pace))
        return spent + seconds * rows <= share * self.limit

    @property
    def _folder(self) -> Path:
        return self.journal.folder.searching / self.arm
