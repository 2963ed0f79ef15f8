"""TELL: fine-tune a language model well when there are only 15 to 1,000 examples of a task.

Every verb of the command line is one call here, imported on first use so that ``import tell`` stays quick:
``tell.tune``, ``tell.plan``, ``tell.evaluate``, ``tell.chat``, ``tell.write_report``, ``tell.write_anchor``,
``tell.separate``, ``tell.build_halu_cot_json``, ``tell.build_is_en_news``, ``tell.demo``, ``tell.run_study``,
``tell.plan_study`` (with ``tell.Changes``, ``tell.Execution``); and ``tell.load_config``, ``tell.Config``,
``tell.Anchor``, ``tell.Example``, ``tell.RunFolder``, ``tell.TellError``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tell.cpu import limit_libraries

limit_libraries()  # before anything imports torch

__version__ = "0.1.0"

_PLACES = {
    "tune": "tell.run.tune",
    "plan": "tell.verbs.plan_run",
    "evaluate": "tell.verbs.evaluate",
    "demo": "tell.verbs.demo",
    "chat": "tell.verbs.chat",
    "write_report": "tell.report.write",
    "write_anchor": "tell.verbs.write_anchor",
    "separate": "tell.verbs.separate",
    "build_halu_cot_json": "tell.paper.halu_cot_json",
    "build_is_en_news": "tell.paper.is_en_news",
    "run_study": "tell.studies.study",
    "plan_study": "tell.studies.study",
    "Changes": "tell.studies.open_study",
    "Execution": "tell.studies.executors.registry",
    "load_config": "tell.config",
    "make_config": "tell.config",
    "Config": "tell.config",
    "Anchor": "tell.anchor.anchor",
    "Example": "tell.data.example",
    "RunFolder": "tell.folder",
    "TellError": "tell.errors",
    # The steps of `tune`, each of which can be called alone.
    "Journal": "tell.run.journal",
    "Session": "tell.run.session",
    "ModelCache": "tell.run.session",
    "Prepared": "tell.run.prepare",
    "Trust": "tell.run.claim",
    "Findings": "tell.run.metrics",
    "load_task": "tell.run.task",
    "read_inputs": "tell.run.tune",
    "open_session": "tell.run.tune",
    "settle_anchor": "tell.run.tune",
    "prepare": "tell.run.prepare",
    "write_plan": "tell.run.record",
    "train_arms": "tell.run.train_arms",
    "measure_arms": "tell.run.measure",
    "run_metrics": "tell.run.metrics",
    "write_results": "tell.run.metrics",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(import_module(_PLACES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tell' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
