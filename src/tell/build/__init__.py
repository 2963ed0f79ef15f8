"""Datasets of the paper, made from their public sources."""

from tell.build.endpoint import OpenAITeacher
from tell.build.halu_cot_json import Built, build_halu_cot_json
from tell.build.halueval import ANCHOR, SCHEMA
from tell.build.offline import OfflineTeacher
from tell.build.teacher import Teacher, Usage

__all__ = ["ANCHOR", "SCHEMA", "Built", "OfflineTeacher", "OpenAITeacher", "Teacher", "Usage", "build_halu_cot_json"]
