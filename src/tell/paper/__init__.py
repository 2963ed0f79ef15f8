"""Datasets of the paper, made from their public sources."""

from tell.paper.destination import Replace
from tell.paper.endpoint import Limits, OpenAITeacher
from tell.paper.halu_cot_json import Built, build_halu_cot_json
from tell.paper.halueval import ANCHOR, SCHEMA
from tell.paper.is_en_news import BuiltNews, build_is_en_news
from tell.paper.offline import OfflineTeacher
from tell.paper.teacher import Prices, Teacher, Usage

__all__ = [
    "ANCHOR",
    "SCHEMA",
    "Built",
    "BuiltNews",
    "Limits",
    "OfflineTeacher",
    "OpenAITeacher",
    "Prices",
    "Replace",
    "Teacher",
    "Usage",
    "build_halu_cot_json",
    "build_is_en_news",
]
