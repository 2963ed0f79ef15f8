"""Hostile inputs of every kind, each a command line in a folder of its own."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from hostile.mutate import mutate_bytes, mutate_tree, odd_text
from tell.cli.common import FLAGS
from tell.config import Config, key_paths

ROWS = [{"prompt": f"Is {i} even?", "completion": "yes" if i % 2 == 0 else "no"} for i in range(12)]
LAYOUTS: tuple[Callable[[int], dict], ...] = (
    lambda i: {"prompt": f"p {i}", "completion": json.dumps({"a": i, "b": "x"})},
    lambda i: {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a"}]},
    lambda i: {"conversations": [{"from": "human", "value": f"q {i}"}, {"from": "gpt", "value": "a"}]},
    lambda i: {"instruction": f"Do {i}", "input": "this", "output": "done", "history": [["a", "b"]]},
    lambda i: {"question": f"Where is {i}?", "answers": {"text": ["here"], "answer_start": [0]}},
    lambda i: {"text": f"mail {i}", "label": i % 3},
    lambda i: {
        "prompt": [{"role": "user", "content": f"q {i}"}],
        "completion": [{"role": "assistant", "content": "a"}],
    },
)
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0}, "b": {"enum": ["x", "y"]}, "c": {"$ref": "#/$defs/d"}},
    "required": ["a", "b"],
    "$defs": {"d": {"type": ["string", "null"], "pattern": "^[a-z]+$"}},
}
RECIPE = {
    "title": "A study",
    "config": {"task": {"data": "rows.jsonl"}, "model": {"name": "MODEL"}, "general": {"source": "none"}},
    "grid": {"task.rows": [2, 3], "mix.repeat": [1]},
    "arms": ["base", "tell"],
    "seeds": [1],
    "figures": [{"x": "task.rows", "y": "accuracy"}],
    "fits": [{"x": "task.rows", "y": "accuracy", "arm": "tell"}],
    "variables": {"v": "x"},
}
CONFIG = {
    "preset": "modern",
    "task": {"data": "rows.jsonl", "test_fraction": 0.3},
    "model": {"name": "MODEL"},
    "general": {"source": "none", "self": {"top_p": 0.9}},
    "anchor": {"text": "Say it.", "place": "user"},
    "train": {"learning_rate": 1e-3, "lora_r": 4},
    "eval": {"arms": ["base", "tell"]},
    "seed": 1,
}
FORMATS = ("jsonl", "json", "csv", "tsv", "jsonl.gz", "jsonl.zst", "parquet")
OF_MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@dataclass
class Places:
    """What cases are made of.

    Attributes:
        model: folder of a tiny model.
        run: folder of a finished run.
    """

    model: Path
    run: Path


@dataclass
class Case:
    """A command line, and what stands for its input in a message.

    Attributes:
        writes: it may write before it is refused, as a run that is resumed does.
    """

    argv: list[str]
    about: str
    codes: tuple[int, ...] = (0, 2)
    writes: bool = False


def encoded(rows: list[Any], form: str) -> bytes:
    """Rows as a file of a format."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if form == "json":
        return json.dumps(rows).encode()
    if form in ("csv", "tsv"):
        out = io.StringIO()
        table = csv.writer(out, delimiter="," if form == "csv" else "\t")
        flat = [row if isinstance(row, dict) else {"x": row} for row in rows]
        names = list(dict.fromkeys(name for row in flat for name in row))
        table.writerows([names, *[[row.get(name, "") for name in names] for row in flat]])
        return out.getvalue().encode("utf-8", "surrogatepass")
    if form == "jsonl.gz":
        return gzip.compress(lines, mtime=0)
    if form == "jsonl.zst":
        import zstandard

        return zstandard.compress(lines)
    if form == "parquet":
        try:
            table = pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            table = pyarrow.Table.from_pylist(ROWS)
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink)
        return sink.getvalue()
    return lines


def _plan(name: str, places: Places, *more: str) -> list[str]:
    return ["plan", name, "--model", str(places.model), "--general", "none", "--anchor", "none", *more]


def as_yaml(tree: Any) -> bytes:
    """A tree as YAML, in the form of JSON where it is too deep for the writer."""
    try:
        text = yaml.safe_dump(tree, allow_unicode=True)
    except RecursionError:
        text = json.dumps(tree)
    return text.encode("utf-8", "surrogatepass")


def data(rng: random.Random, here: Path, places: Places) -> Case:
    """The bytes of a data file."""
    form = rng.choice(FORMATS)
    content = mutate_bytes(
        rng, encoded([rng.choice(LAYOUTS)(i) for i in range(8)] if rng.random() < 0.3 else ROWS, form)
    )
    (here / f"rows.{form}").write_bytes(content)
    return Case(_plan(f"rows.{form}", places), f"rows.{form}: {content[:300]!r}")


def layout(rng: random.Random, here: Path, places: Places) -> Case:
    """The values of rows."""
    make, form = rng.choice(LAYOUTS), rng.choice(FORMATS)
    rows = [make(i) for i in range(10)]
    rows = mutate_tree(rng, rows) if rng.random() < 0.5 else [mutate_tree(rng, row) for row in rows]
    (here / f"rows.{form}").write_bytes(encoded(rows if isinstance(rows, list) else [rows], form))
    return Case(_plan(f"rows.{form}", places), f"{form}: {str(rows)[:400]!r}")


def config(rng: random.Random, here: Path, places: Places) -> Case:
    """A configuration, by its values or its bytes."""
    (here / "rows.jsonl").write_bytes(encoded(ROWS, "jsonl"))
    tree = {**CONFIG, "model": {"name": str(places.model)}}
    content = as_yaml(mutate_tree(rng, tree) if rng.random() < 0.5 else tree)
    if rng.random() < 0.5:
        content = mutate_bytes(rng, content)
    (here / "run.yaml").write_bytes(content)
    return Case(["plan", "-c", "run.yaml"], f"run.yaml: {content[:600]!r}")


def override(rng: random.Random, here: Path, places: Places) -> Case:
    """``--set``."""
    (here / "rows.jsonl").write_bytes(encoded(ROWS, "jsonl"))
    keys = [key for key in key_paths(Config) if key != "task.data"]
    key = rng.choice(keys) if rng.random() < 0.9 else rng.choice(("", ".", "train", "a.b.c", "task..data", "x" * 300))
    text = f"{key}={odd_text(rng)}"
    return Case(_plan("rows.jsonl", places, "--set", text), f"--set {text[:300]!r}")


def flag(rng: random.Random, here: Path, places: Places) -> Case:
    """A flag of `tell plan`, or the name of the data."""
    (here / "rows.jsonl").write_bytes(encoded(ROWS, "jsonl"))
    chosen, text = (
        rng.choice([flag for flag in FLAGS if flag.parse is not None and "plan" in flag.verbs]),
        odd_text(rng),
    )
    if rng.random() < 0.1:
        return Case(_plan(text, places), f"DATA {text[:300]!r}")
    return Case(_plan("rows.jsonl", places, chosen.name, text), f"{chosen.name} {text[:300]!r}")


def recipe(rng: random.Random, here: Path, places: Places) -> Case:
    """A recipe, by its values or its bytes."""
    (here / "rows.jsonl").write_bytes(encoded(ROWS, "jsonl"))
    tree = {**RECIPE, "config": {**RECIPE["config"], "model": {"name": str(places.model)}}}
    content = as_yaml(mutate_tree(rng, tree) if rng.random() < 0.6 else tree)
    if rng.random() < 0.5:
        content = mutate_bytes(rng, content)
    (here / "recipe.yaml").write_bytes(content)
    return Case(["study", "recipe.yaml", "--dry-run"], f"recipe.yaml: {content[:600]!r}", codes=(0, 1, 2))


STUDY = {
    "title": "A study",
    "source": "recipe.yaml",
    "created": "2026-01-01T00:00:00+00:00",
    "root": "..",
    "recipe": {"config": {"seed": 1}, "grid": [{"task.rows": [2]}]},
    "rows": [{"point": {"task.rows": 2}, "arm": "base", "seed": 1, "cell": "base-0123456789abcdef"}],
    "cells": {"base-0123456789abcdef": {"state": "done", "error": None, "seconds": 1.5, "attempts": 1, "host": "x"}},
}
RECORD = {"state": "done", "seconds": 2.0, "training_seconds": 1.0, "attempts": 1, "evaluation": "x", "host": "x"}


def studied(rng: random.Random, here: Path, places: Places) -> Case:
    """What an earlier study left: its state, or the record of a cell."""
    case = recipe(random.Random(0), here, places)
    (here / "recipe.yaml").write_bytes(
        as_yaml({**RECIPE, "config": {**RECIPE["config"], "model": {"name": str(places.model)}}})
    )
    for path, tree in (("recipe/study.json", STUDY), ("cells/base-0123456789abcdef.json", RECORD)):
        (here / "studies" / path).parent.mkdir(parents=True)
        content = json.dumps(mutate_tree(rng, tree)).encode()
        (here / "studies" / path).write_bytes(mutate_bytes(rng, content) if rng.random() < 0.4 else content)
    return Case(case.argv, f"{content[:300]!r}", case.codes)


def schema(rng: random.Random, here: Path, places: Places) -> Case:
    """A schema of answers."""
    (here / "rows.jsonl").write_bytes(encoded([LAYOUTS[0](i) for i in range(8)], "jsonl"))
    content = json.dumps(mutate_tree(rng, SCHEMA)).encode()
    if rng.random() < 0.4:
        content = mutate_bytes(rng, content)
    (here / "schema.json").write_bytes(content)
    return Case(_plan("rows.jsonl", places, "--schema", "schema.json"), f"schema.json: {content[:500]!r}")


def model(rng: random.Random, here: Path, places: Places) -> Case:
    """A file of the model's folder."""
    (here / "rows.jsonl").write_bytes(encoded(ROWS, "jsonl"))
    shutil.copytree(places.model, here / "model", copy_function=os.link)
    name = rng.choice([name for name in os.listdir(places.model) if name in OF_MODEL or name.endswith(".safetensors")])
    path = here / "model" / name
    content = _changed(rng, path)
    _replace(path, content)
    return Case(_plan("rows.jsonl", Places(Path("model"), places.run)), f"model/{name}: {content[:300]!r}")


RUN_FILES = ("run.yaml", "status.json", "anchor.json", "split.json", "findings.json", "metrics.json", "plan.json")
RUN_FILES += ("manifest.parquet", "schema.json", "predictions/tell.jsonl", "logs/tell.jsonl", "report.html")
OF_EVAL = ("run.yaml", "anchor.json", "split.json", "plan.json", "findings.json", "metrics.json", "schema.json")
OF_EVAL += ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
OF_RESUME = ("anchor.json", "split.json", "plan.json", "manifest.parquet", "adapter/result.json")


def report(rng: random.Random, here: Path, places: Places) -> Case:
    """A file of a run folder, for the page."""
    name, about = _tampered(rng, here, places, RUN_FILES)
    return Case(["report", "run", *(["run", "-o", "page.html"] if rng.random() < 0.3 else [])], f"run/{name}: {about}")


def evaluate(rng: random.Random, here: Path, places: Places) -> Case:
    """A file of a run folder, for answers."""
    name, about = _tampered(rng, here, places, OF_EVAL)
    argv = (
        ["eval", "run", "--rows", "1", "--arms", "tell"] if rng.random() < 0.6 else ["chat", "run", "Hello", "--greedy"]
    )
    return Case(argv, f"{argv[0]} run/{name}: {about}")


def resume(rng: random.Random, here: Path, places: Places) -> Case:
    """A file of a run folder, before it is resumed; an order that is not there ends it before it starts."""
    name, about = _tampered(rng, here, places, ("run.yaml", "status.json"))
    return Case(["tune", "--resume", "--out", "run", "--order", "none"], f"resume run/{name}: {about}")


def resumed(rng: random.Random, here: Path, places: Places) -> Case:
    """A file of a run folder that is read while the run is resumed, to its end."""
    name, about = _tampered(rng, here, places, OF_RESUME, copy=shutil.copy2)
    return Case(["tune", "--resume", "--out", "run"], f"resumed run/{name}: {about}", writes=True)


def _tampered(
    rng: random.Random, here: Path, places: Places, names: tuple[str, ...], copy: Callable[..., object] = os.link
) -> tuple[str, str]:
    shutil.copytree(places.run, here / "run", copy_function=copy)
    name = rng.choice([name for name in names if (places.run / name).exists()])
    content = _changed(rng, here / "run" / name)
    _replace(here / "run" / name, content)
    return name, repr(content[:400])


def _replace(path: Path, content: bytes) -> None:
    path.unlink()  # the other name of a linked file stays as it is
    path.write_bytes(content)


def _changed(rng: random.Random, path: Path) -> bytes:
    content = path.read_bytes()
    if rng.random() < 0.6 and path.suffix in (".json", ".yaml", ".jsonl"):
        if path.suffix == ".jsonl":
            return b"".join(
                json.dumps(mutate_tree(rng, json.loads(line))).encode() + b"\n" for line in content.splitlines()
            )
        tree = mutate_tree(rng, yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content))
        if path.suffix == ".yaml":
            return as_yaml(tree)
        return json.dumps(tree).encode()
    return mutate_bytes(rng, content)


KINDS: dict[str, tuple[Callable[[random.Random, Path, Places], Case], int]] = {  # and how many by default
    **{make.__name__: (make, 28) for make in (data, layout, schema, override, flag)},
    **{make.__name__: (make, 36) for make in (config, recipe, model, report)},
    **{make.__name__: (make, 16) for make in (evaluate, resume, studied)},
    resumed.__name__: (resumed, 10),
}
