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
    "plan": "tell.run.plan",
    "evaluate": "tell.verbs.evaluate",
    "demo": "tell.verbs.demo",
    "chat": "tell.verbs.chat",
    "write_report": "tell.report.write",
    "write_anchor": "tell.run.choose_anchor",
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
