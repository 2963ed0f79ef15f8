"""``report.html`` of one run: read the folder, choose what to show, fill the template."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tell.files import write_text
from tell.folder import RunFolder
from tell.metric_names import METRICS
from tell.names import ARMS
from tell.number_text import NARROW, show, show_count, show_duration, show_interval, show_power
from tell.parts import PARTS
from tell.report import palette, sections
from tell.report.benchmark_section import benchmark_grid, benchmark_tables
from tell.report.cases import build_cases
from tell.report.glossary import GLOSSARY
from tell.report.html_text import plain, shorten, visible, word_diff
from tell.report.label_section import label_tables
from tell.report.read_run import Run, mapping, read_run
from tell.report.score_tables import (
    CONSTANT,
    arm_grid,
    arm_table,
    difference_grid,
    difference_table,
    forgetting_tables,
    general_answers,
    parts_table,
    readout_lines,
)
from tell.score.verdict import verdict

GENERATOR = '<meta name="generator" content="tell report">'  # marks a page that may be replaced
STATES = {
    "running": "This run is still in progress; this page shows what it has written so far.",
    "interrupted": "This run was interrupted; this page shows what it had written. Continue it with --resume.",
    "failed": "This run failed; this page shows what it had written.",
}


@cache
def environment() -> Environment:
    """The templates: autoescaped, with the hidden characters of every printed value made visible."""
    env = Environment(
        loader=PackageLoader("tell.report", "templates"),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "number": show,
        "interval": show_interval,
        "count": show_count,
        "power": show_power,
        "duration": show_duration,
        "plain": plain,
        "shorten": shorten,
        "prose": prose,
        "units": lambda text: str(text).replace(" %", f"{NARROW}%"),  # no line break before the sign
    }
    env.globals["word_diff"] = word_diff
    return env


@cache
def stylesheet() -> tuple[Markup, str]:
    """The stylesheet and its CSP source, which allows this text and no other."""
    source = palette.css() + resources.files("tell.report").joinpath("templates/style.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return Markup(source), f"sha256-{digest}"


def prose(text: object) -> str:
    """A note as a sentence, with a capital and a full stop."""
    line = str(text).strip()
    name = re.match(r"\S*[./_]\w+:", line)  # of a file or a key: as it is written
    first = line[:1] if name else line[:1].upper()
    return line and first + line[1:] + ("" if line[-1] in ".?!" else ".")


def fill(template: str, **context: object) -> str:
    """The page as text; lone surrogates that did not pass through `visible` become ``?``."""
    style, digest = stylesheet()
    page = environment().get_template(template)
    html = page.render(style=style, style_digest=digest, generator=Markup(GENERATOR), **context)
    return html.encode("utf-8", "replace").decode("utf-8")


def verdict_of(run: Run) -> str | None:
    """The verdict sentence, or None without scores."""
    return verdict(run.metrics) if mapping(run.metrics, "arms") else None


def render(folder: RunFolder, *, state: str | None = None) -> str:
    """The report of one run as one self-contained HTML page.

    Built from the files of the run folder alone; the section of a missing file is left out or says so. The page loads
    nothing and runs no script: its policy forbids both.

    Args:
        state: of the run, if status.json does not have it yet.

    Raises:
        TellError: the folder does not exist.
    """
    run = read_run(folder)
    if state is not None:
        run.status = {"state": state}
    data, model = sections.data_name(run), sections.model_name(run)
    used = [*mapping(run.metrics, "arms"), *run.predictions, *run.logs]
    scored = {name for arm in mapping(run.metrics, "arms").values() if isinstance(arm, dict) for name in arm}
    scored |= {"loss", "task_format"} if mapping(run.metrics, "forgetting") else set()
    return fill(
        "page.html.j2",
        data=data,
        model=model,
        run=run,
        facts=sections.facts(run),
        state=STATES.get(str(run.status.get("state"))),
        error=run.status.get("error"),
        verdict=verdict_of(run),
        arms=arm_table(run.metrics),
        arms_grid=arm_grid(run.metrics),
        differences=difference_table(run.metrics),
        differences_grid=difference_grid(run.metrics),
        parts=parts_table(run.metrics),
        part_words=PARTS,
        readout=readout_lines(run.metrics),
        labels=label_tables(run.metrics),
        constant=CONSTANT,
        losses=sections.losses(run),
        mixture=sections.mixture(run),
        cases=build_cases(run),
        forgetting=forgetting_tables(run.metrics),
        benchmarks=benchmark_tables(run.metrics),
        benchmark_grid=benchmark_grid(run.metrics),
        general=general_answers(run.metrics),
        findings=sections.findings(run),
        anchor=sections.anchor(run),
        search=sections.search(run),
        again=sections.again(run),
        arm_words=[(arm.name, arm.about) for arm in ARMS.values() if not used or arm.name in used],
        metric_words=[spec for name, spec in METRICS.items() if name in scored],
        glossary=GLOSSARY,
    )


def write_page(folder: RunFolder, *, state: str | None = None) -> Path:
    """Write ``report.html`` into the run folder, whole or not at all.

    Args:
        state: as for `render`.

    Raises:
        TellError: the folder does not exist or cannot be written.
    """
    write_text(folder.report, render(folder, state=state))
    return folder.report
