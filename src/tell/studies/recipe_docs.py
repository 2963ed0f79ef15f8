"""docs/reference/recipe.md, from the recipe's keys: `python -m tell.studies.recipe_docs > docs/reference/recipe.md`."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from tell.metric_names import SCORES
from tell.studies import recipe
from tell.studies.recipe import PARTS, Recipe

HEAD = """\
# Recipes

Every key of a recipe for `tell study`, with its default and meaning. Written by `python -m tell.studies.recipe_docs`;
[config.md](config.md) has the keys of a run, which go under `config` and `grid`. `recipes/` has one for each figure.
"""
TAIL = """
## Names of metrics
Scores: {scores}. A custom scorer's metrics have the name of its function, or the keys of what it returns.

Losses on general text are `probe loss` and `witness loss` (fixed texts) and `general held out loss` (rows of the
general data that were held out), each also with ` change`, from the untuned model. Benchmarks are `benchmark
openbookqa` and so on, and under `metrics` all of them are `benchmarks`; hidden states have `linear_probe`,
`silhouette`, `mmd2` and `length_probe`. The page lists metrics that no finished cell has.
"""


def recipe_docs() -> str:
    """All keys as Markdown: an example, a table of the top level and one of each part."""
    example, _, variables = (recipe.__doc__ or "").partition("\n\n")[2].partition("\n\n")
    parts = [HEAD, example, "", variables.strip().replace("``", "`"), "", *_table(Recipe)]
    for name, model in PARTS.items():
        parts += ["", f"## {name}", (model.__doc__ or "").strip().replace("``", "`"), "", *_table(model)]
    return "\n".join(parts) + "\n" + TAIL.format(scores=", ".join(f"`{name}`" for name in SCORES))


def _table(model: type[BaseModel]) -> Iterator[str]:
    yield from ("| key | default | meaning |", "|---|---|---|")
    for name, info in model.model_fields.items():
        default = "must be given" if info.is_required() else _default(info.get_default(call_default_factory=True))
        link = f"see [{name}](#{name})" if name in PARTS else None
        meaning = ", ".join(filter(None, (info.description, link))).replace("|", "\\|")
        yield f"| `{name}` | {default} | {meaning} |"


def _default(value: object) -> str:
    if isinstance(value, BaseModel) or value in (None, "", (), {}, ({},)):
        return ""
    if isinstance(value, tuple):
        return f"`{', '.join(map(str, value))}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(recipe_docs(), end="")
