"""Datasets of the paper, made from their public sources."""

from tell.build.endpoint import OpenAITeacher
from tell.build.halu_cot_json import Built, build_halu_cot_json
from tell.build.halueval import ANCHOR, SCHEMA
from tell.build.is_en_news import BuiltNews, build_is_en_news
from tell.build.offline import OfflineTeacher
from tell.build.teacher import Teacher, Usage

__all__ = [
    "ANCHOR",
    "SCHEMA",
    "Built",
    "BuiltNews",
    "OfflineTeacher",
    "OpenAITeacher",
    "Teacher",
    "Usage",
    "build_halu_cot_json",
    "build_is_en_news",
]
