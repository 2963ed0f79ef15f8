"""The main job: from a file of examples to an adapter, its scores and a report."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from tell import __version__
from tell.anchor.anchor import Anchor
from tell.config import Config
from tell.data.sources import check_source
from tell.errors import Interrupted
from tell.mix.amount import Draw
from tell.mix.manifest import write_manifest
from tell.mix.mixture import Mixture
from tell.mix.orders import get_order
from tell.models.machine import cpu_name
from tell.models.predict import record_speed
from tell.progress import Display, Silent
from tell.rows.table import RowTable
from tell.run import RunFolder, write_json, write_jsonl, write_text
from tell.study.folder import claim, open_folder
from tell.study.forgetting import Forgetting, general_sets, measure, numbers
from tell.study.plan import arm_costs, describe_plan, fit_minutes
from tell.study.prepare import (
    General,
    Task,
    anchor_of,
    arm_mixtures,
    draw_general,
    limit_task,
    load_general,
    load_task,
    place_anchor,
    split_file,
    stand_in_anchor,
    task_table,
    wanted_arms,
)
from tell.study.scoring import (
    adapter_folder,
    answer_limit,
    answer_rows,
    arm_numbers,
    arm_prompts,
    score_rows,
    scorer_of,
)
from tell.study.self_data import write_self_data
from tell.study.stop import Stop

MEASURED = ("base", "sft", "sft-matched", "general", "tell")  # arms with weights of their own


def tune(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    command: str = "",
) -> RunFolder:
    """Tune a model by TELL, score it against its controls, and write the report.

    Args:
        config: see `tell.load_config`.
        resume: go on with the run in the output folder; it ends as if it had never been stopped.
        overwrite: replace the run in the output folder.
        display: shows progress.
        command: kept in the report.

    Returns:
        The run folder.

    Raises:
        TellError: bad input, said before anything is written.
        Interrupted: SIGINT or SIGTERM; the folder can be resumed.
    """
    display = display or Silent()
    begin = time.monotonic()
    folder, resumed = claim(config, resume=resume, overwrite=overwrite)
    arms = wanted_arms(config)
    task = load_task(config, display)
    scorer_of(config, task.kind)  # a scorer that cannot be loaded is said now, not after training
    run = _Run(config, folder, task, arms, display, Stop(folder.root), begin, command)
    run.check_rows()
    open_folder(folder, fresh=not resumed, config=config)
    with run.stop.listening():
        try:
            run.go()
        except Interrupted:
            folder.set_status("interrupted", stage=run.stage)
            raise
        except BaseException as error:
            folder.set_status("failed", stage=run.stage, error=str(error) or type(error).__name__)
            raise
    folder.set_status("done", stage="done")
    return folder


@dataclass
class _Run:
    """One run on its way; ``go`` is the whole story."""

    config: Config
    folder: RunFolder
    task: Task
    arms: list[str]
    display: Display
    stop: Stop
    begin: float
    command: str
    stage: str = "start"
    loaded: Any = None
    engine: Any = None
    base_validation: float | None = None

    def check_rows(self) -> None:
        """Refuse bad rows, budgets, orders and general files before anything is written."""
        config, task = self.config, self.task
        get_order(config.mix.order)
        anchor = anchor_of(config)
        stand_in = stand_in_anchor(task) if anchor is None else anchor
        train, split = task.train, dict(task.findings["split"])
        limit_task(task, stand_in)
        task_table(task, stand_in, task.train)
        task.train, task.findings["split"] = train, split  # the true anchor decides again
        if config.general.source not in ("self", "none"):
            check_source(config.general.source)

    def go(self) -> None:
        self._at("anchor")
        anchor = self._anchor()
        limit_task(self.task, anchor)
        table = task_table(self.task, anchor, self.task.train)
        self._at("general data")
        general, draw = self._general(table)
        if general is not None and draw is not None and self.config.max_minutes:
            self._calibrate(table)
            spent = time.monotonic() - self.begin
            draw = fit_minutes(self.task, table, general, draw, self.config.max_minutes, spent)
        mixtures = arm_mixtures(self.config, table, general, draw)
        plan = describe_plan(self.task, table, general, draw)
        for text in plan["mixture"]["notices"]:
            self.display.note(text)
        self._write_before(mixtures["tell"], plan)
        results = self._train(mixtures)
        self._at("evaluate")
        metrics = self._score(anchor, general)
        metrics["mixture"] = plan["mixture"]
        metrics["train"] = self._train_numbers(results, mixtures)
        self._write_findings(general, table)
        write_json(self.folder.metrics, metrics)
        self._at("report")
        from tell.report.page import write_report

        write_report(self.folder)

    def _at(self, stage: str) -> None:
        self.stage = stage
        self.stop.check()
        self.folder.set_status("running", stage=stage)

    def _model(self) -> Any:
        """The base model, loaded once, and its engine."""
        if self.loaded is None:
            import torch

            from tell.generate.engine import Engine
            from tell.models.load import load_model

            settings = self.config.model
            self.loaded = load_model(
                self.task.files,
                dtype=settings.dtype,
                device=settings.device,
                trust_remote_code=settings.trust_remote_code,
            )
            torch.manual_seed(self.config.seed)
            self.engine = Engine(
                self.loaded.model, device=self.loaded.device, max_positions=self.task.files.architecture.max_positions
            )
            self.display.note(f"{self.task.files.name} ({self.task.files.origin}); {self.loaded.why}")
        return self.loaded.model

    def _anchor(self) -> Anchor:
        """The anchor by hand, from the folder when resumed, or written by the model."""
        task, path = self.task, self.folder.anchor
        if path.exists():
            return Anchor.load(path)
        anchor = anchor_of(self.config)
        candidates: list[dict] = []
        if anchor is None:
            from tell.anchor.write import write_anchor_candidates

            model = self._model()
            anchor, candidates = write_anchor_candidates(
                self.config,
                task.chat,
                model,
                self.engine,
                task.train,
                task.validation,
                task.kind,
                self.display,
                self.stop.check,
            )
        anchor = place_anchor(task, anchor, self.display)
        write_json(path, {**anchor.to_dict(), "candidates": candidates})
        if anchor:
            self.display.note(f"anchor ({anchor.origin}, {anchor.place}): {anchor.text}")
        return anchor

    def _general(self, table: RowTable) -> tuple[General | None, Draw | None]:
        source = self.config.general.source
        if source == "none":
            return None, None
        if source == "self":
            source = self._self_file(table)
        general = load_general(self.task, source, self.display)
        if self.config.general.source == "self":
            general.facts["path"] = f"self: written by {self.task.files.name}"
        return general, draw_general(self.config, general, int(table.unit.sum()))

    def _self_file(self, table: RowTable) -> str:
        """Rows that the model writes itself, until they suffice for the mix and the held-out rows."""
        amount, held_out = self.config.general, self.config.eval.forgetting_rows
        backend = self.task.unit.backend
        counted: list[int] = []

        def enough(rows: list[dict]) -> float:
            fresh = [f"{row['instruction']}\n{row['output']}" for row in rows[len(counted) :]]
            counted.extend(len(e.ids) for e in backend.encode_batch(fresh, add_special_tokens=False))
            if amount.rows is not None:
                need = float(amount.rows)
                have = len(counted) - held_out
            else:
                need = amount.tokens if amount.tokens is not None else (amount.ratio or 0) * int(table.unit.sum())
                have = sum(counted) * (1 - held_out / max(len(counted), held_out + 1))
            return have / need if need else 1.0

        self._model()
        path, facts = write_self_data(
            self.config,
            self.task.chat,
            self.engine,
            model=self.task.files.fingerprint,
            enough=enough,
            display=_Checked(self.display, self.stop),
        )
        if facts["thrown"]:
            thrown = ", ".join(f"{n} {reason}" for reason, n in sorted(facts["thrown"].items(), key=lambda x: -x[1]))
            self.task.notices.append(
                f"general data: the model wrote {facts['asked']:,} instructions, {facts['kept']:,} kept ({thrown})"
            )
        return str(path)

    def _calibrate(self, table: RowTable) -> None:
        """Measure two training steps, so that --max-minutes goes by this machine as it is now."""
        import torch

        from tell.train.batches import TrainRow
        from tell.train.lora import add_lora, remove_lora
        from tell.train.step import Body, step_loss

        model = self._model()
        tuned = add_lora(model, self.task.training, seed=self.config.seed)
        try:
            body = Body(tuned)
            rows = [TrainRow(*table.row(i % len(table)), 0, True) for i in range(self.config.train.batch_size)]
            for _ in range(2):  # the first warms up
                begin = time.monotonic()
                out = step_loss(
                    body,
                    rows,
                    normalization=self.config.train.loss_normalization,
                    micro_tokens=self.config.train.micro_tokens,
                    device=self.loaded.device,
                )
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds = time.monotonic() - begin
        finally:
            remove_lora(tuned)
        self._record_speed(out.tokens / seconds)

    def _record_speed(self, tokens_per_second: float) -> None:
        record_speed(
            self.task.files.fingerprint,
            self.loaded.device.type,
            "bf16" if "bfloat16" in str(self.loaded.dtype) else "fp32",
            tokens_per_second,
        )

    def _write_before(self, tell: tuple[dict, Mixture], plan: dict) -> None:
        """Everything that is decided before training."""
        folder, task = self.folder, self.task
        write_text(folder.split, split_file(task))
        if task.kind.schema is not None:
            write_json(folder.schema, task.kind.schema)
        write_json(folder.plan, plan)
        tables, mixture = tell
        write_manifest(folder.manifest, mixture, tables, self.config.train.batch_size)

    def _train(self, mixtures: dict) -> dict[str, dict]:
        """Train the arms that are asked for; finished ones are kept. Their results by arm."""
        from tell.train.trainer import Trainer

        results: dict[str, dict] = {}
        wanted = [arm for arm in ("sft", "sft-matched", "general", "tell") if self._needs(arm) and arm in mixtures]
        for arm in sorted(wanted, key=lambda a: a != "tell"):  # the adapter people wait for comes first
            self._at(f"train {arm}")
            place = adapter_folder(self.folder, arm)
            done = place / "result.json"
            if done.exists():
                results[arm] = json.loads(done.read_text(encoding="utf-8"))
                continue
            tables, mixture = mixtures[arm]
            model = self._model()
            total = int(mixture.column("tokens").sum(dtype=np.int64))
            with self.display.bar(f"train {arm}", total, "tokens") as advance:
                counted = 0

                def progress(report: Any, advance: Any = advance, arm: str = arm) -> None:
                    nonlocal counted
                    losses = ", ".join(f"{k} {v:.3f}" for k, v in report.by_source.items())
                    advance(report.tokens_total - counted, f"step {report.step}/{report.steps}, loss {losses}")
                    counted = report.tokens_total

                result = Trainer(
                    model,
                    tables,
                    mixture,
                    self.task.training,
                    folder=place,
                    log=self.folder.losses(arm),
                    seed=self.config.seed,
                    device=self.loaded.device,
                    stopped=self.stop,
                    progress=progress,
                ).run(resume=True)
            results[arm] = result.to_dict()
            write_json(done, results[arm])
            shutil.rmtree(place / "checkpoint", ignore_errors=True)
            if arm == "tell":
                self._finish_adapter(result, arm_costs(self.task, mixture)["computed_tokens"])
        return results

    def _needs(self, arm: str) -> bool:
        return arm in self.arms or (arm == "tell" and "tell-anchor" in self.arms)

    def _finish_adapter(self, result: Any, computed: int) -> None:
        """What the adapter needs to be used elsewhere, and the machine's speed for the next plan."""
        anchor = json.loads(self.folder.anchor.read_text(encoding="utf-8"))
        anchor.pop("candidates", None)
        write_json(
            self.folder.adapter / "tell.json",
            {"anchor": anchor, "base_model": self.task.files.name, "revision": self.config.model.revision},
        )
        self._name_base_model()
        if result.steps >= 10 and result.seconds > 0:
            self._record_speed(computed / result.seconds)

    def _name_base_model(self) -> None:
        """peft notes the folder the weights lay in; the name it was asked by says more elsewhere."""
        path = self.folder.adapter / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = self.task.files.name
        write_json(path, config)

    def _score(self, anchor: Anchor, general: General | None) -> dict:
        """Answers, scores and forgetting of every arm."""
        from tell.generate.sampler import Decoding
        from tell.run import read_jsonl
        from tell.train.lora import adapter_merged

        config, task = self.config, self.task
        model = self._model()
        scorer = scorer_of(config, task.kind)
        limit = answer_limit(config, task.chat, task.train)
        decoding = Decoding.of(config.generate, max_new_tokens=limit, stop_ids=task.chat.stop_ids, seed=config.seed)
        state = general_sets(config, task.chat, general)
        validation = task_table(task, anchor, task.validation, "validation") if task.validation else None
        scored: dict[str, dict] = {}
        for arm in self.arms:
            self._at(f"evaluate {arm}")
            with adapter_merged(model, adapter_folder(self.folder, arm)):
                path = self.folder.prediction(arm)
                if path.exists():
                    rows = read_jsonl(path)
                else:
                    room = self.engine.max_positions - limit
                    prompts, used = arm_prompts(
                        arm,
                        task.chat,
                        anchor,
                        task.test,
                        task.train,
                        examples=config.eval.icl_examples,
                        room=min(room, config.train.max_length * 2),
                    )
                    if arm == "icl":
                        task.notice(f"icl: {used} examples fit into the context", self.display)
                    rows = answer_rows(
                        self.engine,
                        task.chat,
                        prompts,
                        task.test,
                        decoding,
                        title=f"answer {arm}",
                        display=self.display,
                        check=self.stop.check,
                    )
                scored[arm] = score_rows(scorer, rows)
                write_jsonl(path, rows)
                if arm in MEASURED:
                    self._measure(arm, model, scorer, state, validation)
        if state is not None and "tell" in scored and "base" not in state.losses:
            self._measure("base", model, scorer, state, validation)
        values, gaps = arm_numbers(scored, seed=config.seed, samples=config.eval.bootstrap)
        return {
            "task": {"kind": task.kind.name, "primary": scorer.primary},
            "arms": values,
            "differences": gaps,
            "forgetting": numbers(state, config) if state is not None else {},
        }

    def _measure(
        self, arm: str, model: Any, scorer: Any, state: Forgetting | None, validation: RowTable | None
    ) -> None:
        from tell.train.step import row_losses

        if state is not None:
            measure(state, arm, model, self.engine, scorer, self.config, self.task.chat, self.display, self.stop.check)
        if validation is not None and len(validation):
            place = adapter_folder(self.folder, arm)
            losses = row_losses(
                model, validation, micro_tokens=self.config.train.micro_tokens, device=self.engine.device
            )
            value = round(float(losses.mean()), 6)
            if place is None:
                self.base_validation = value
                return
            done = place / "result.json"
            write_json(done, {**json.loads(done.read_text(encoding="utf-8")), "validation_loss": value})

    def _train_numbers(self, results: dict[str, dict], mixtures: dict) -> dict:
        arms: dict[str, dict] = {}
        for arm in results:
            place = adapter_folder(self.folder, arm)
            numbers_ = json.loads((place / "result.json").read_text(encoding="utf-8"))
            arms[arm] = {**numbers_, "flops": arm_costs(self.task, mixtures[arm][1])["flops"]}
        lead = arms.get("tell", {})
        return {
            "steps": lead.get("steps"),
            "tokens": lead.get("tokens"),
            "flops": lead.get("flops"),
            "seconds": lead.get("seconds"),
            "validation_loss_before": self.base_validation,
            "arms": arms,
        }

    def _write_findings(self, general: General | None, table: RowTable) -> None:
        task = self.task
        dropped = [{"origin": d.origin, "reason": d.reason} for d in table.dropped]
        findings = {
            **task.findings,
            "dropped_rows": [*task.findings["dropped_rows"], *dropped, *(general.dropped if general else [])],
            "notices": task.notices,
            "machine": {
                "cpu": cpu_name(),
                "device": str(self.loaded.device),
                "dtype": "bf16" if "bfloat16" in str(self.loaded.dtype) else "fp32",
                "dtype_reason": self.loaded.why,
                "model_origin": task.files.origin,
            },
            "seconds": round(time.monotonic() - self.begin, 1),
            "versions": {
                "tell": __version__,
                **{name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")},
            },
            "command": self.command,
        }
        write_json(self.folder.findings, findings)


class _Checked:
    """A display whose bars also ask whether to stop."""

    def __init__(self, display: Display, stop: Stop) -> None:
        self.display, self.stop = display, stop

    def note(self, text: str) -> None:
        self.display.note(text)

    def bar(self, title: str, total: float | None, unit: str = "rows") -> Any:
        from contextlib import contextmanager

        @contextmanager
        def bar() -> Any:
            with self.display.bar(title, total, unit) as advance:

                def checked(amount: float = 1, info: str = "") -> None:
                    self.stop.check()
                    advance(amount, info)

                yield checked

        return bar()
