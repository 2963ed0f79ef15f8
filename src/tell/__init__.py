"""TELL: fine-tune a language model well when there are only 15 to 1,000 examples of a task.

Every verb of the command line is one function here. All names are imported on first use, so that ``import tell`` stays
fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tell.cpu import limit_libraries
from tell.pass_memory import grow_segments

limit_libraries()  # before anything imports torch
grow_segments()

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tell.anchor.anchor import Anchor as Anchor
    from tell.config import Config as Config
    from tell.config import load_config as load_config
    from tell.config import make_config as make_config
    from tell.data.example import Example as Example
    from tell.errors import TellError as TellError
    from tell.exports.export_run import export as export
    from tell.exports.target import ExportOptions as ExportOptions
    from tell.folder import RunFolder as RunFolder
    from tell.paper.halu_cot_json import build_halu_cot_json as build_halu_cot_json
    from tell.paper.is_en_news import build_is_en_news as build_is_en_news
    from tell.report.write import write_report as write_report
    from tell.run.claim import Trust as Trust
    from tell.run.journal import Journal as Journal
    from tell.run.measure import measure_arms as measure_arms
    from tell.run.metrics import Findings as Findings
    from tell.run.metrics import run_metrics as run_metrics
    from tell.run.metrics import write_results as write_results
    from tell.run.prepare import Prepared as Prepared
    from tell.run.prepare import prepare as prepare
    from tell.run.record import write_plan as write_plan
    from tell.run.session import ModelCache as ModelCache
    from tell.run.session import Session as Session
    from tell.run.task import load_task as load_task
    from tell.run.train_arms import train_arms as train_arms
    from tell.run.tune import open_session as open_session
    from tell.run.tune import read_inputs as read_inputs
    from tell.run.tune import settle_anchor as settle_anchor
    from tell.run.tune import tune as tune
    from tell.studies.executors.execution import Execution as Execution
    from tell.studies.open_study import Changes as Changes
    from tell.studies.study import plan_study as plan_study
    from tell.studies.study import run_study as run_study
    from tell.verbs.add_rows import add as add
    from tell.verbs.benchmark import BenchmarkOptions as BenchmarkOptions
    from tell.verbs.benchmark import benchmark as benchmark
    from tell.verbs.chat import chat as chat
    from tell.verbs.demo import demo as demo
    from tell.verbs.evaluate import evaluate as evaluate
    from tell.verbs.gate import Limit as Limit
    from tell.verbs.gate import NotWorse as NotWorse
    from tell.verbs.gate import gate as gate
    from tell.verbs.look import look as look
    from tell.verbs.plan_run import plan as plan
    from tell.verbs.separate import Comparison as Comparison
    from tell.verbs.separate import separate as separate
    from tell.verbs.write_anchor import write_anchor as write_anchor

_MODULES = {
    "tell.anchor.anchor": ("Anchor",),
    "tell.config": (
        "Config",
        "load_config",
        "make_config",
    ),
    "tell.data.example": ("Example",),
    "tell.errors": ("TellError",),
    "tell.exports.export_run": ("export",),
    "tell.exports.target": ("ExportOptions",),
    "tell.folder": ("RunFolder",),
    "tell.paper.halu_cot_json": ("build_halu_cot_json",),
    "tell.paper.is_en_news": ("build_is_en_news",),
    "tell.report.write": ("write_report",),
    "tell.run.claim": ("Trust",),
    "tell.run.journal": ("Journal",),
    "tell.run.measure": ("measure_arms",),
    "tell.run.metrics": (
        "Findings",
        "run_metrics",
        "write_results",
    ),
    "tell.run.prepare": (
        "Prepared",
        "prepare",
    ),
    "tell.run.record": ("write_plan",),
    "tell.run.session": (
        "ModelCache",
        "Session",
    ),
    "tell.run.task": ("load_task",),
    "tell.run.train_arms": ("train_arms",),
    "tell.run.tune": (
        "open_session",
        "read_inputs",
        "settle_anchor",
        "tune",
    ),
    "tell.studies.executors.execution": ("Execution",),
    "tell.studies.open_study": ("Changes",),
    "tell.studies.study": (
        "plan_study",
        "run_study",
    ),
    "tell.verbs.add_rows": ("add",),
    "tell.verbs.benchmark": (
        "BenchmarkOptions",
        "benchmark",
    ),
    "tell.verbs.chat": ("chat",),
    "tell.verbs.demo": ("demo",),
    "tell.verbs.evaluate": ("evaluate",),
    "tell.verbs.gate": (
        "Limit",
        "NotWorse",
        "gate",
    ),
    "tell.verbs.look": ("look",),
    "tell.verbs.plan_run": ("plan",),
    "tell.verbs.separate": (
        "Comparison",
        "separate",
    ),
    "tell.verbs.write_anchor": ("write_anchor",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'tell' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
