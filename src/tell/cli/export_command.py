"""``tell export``: a finished run in a form that other tools serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tell.cli.common import argument, check_arm, json_switch, option, show, switch, takes_options, trust_switch

if TYPE_CHECKING:
    from rich.console import Console

    from tell.progress import Display

_GGUF, _HUB = "GGUF and Ollama", "Hub"


@dataclass(frozen=True)
class ExportFlags:
    run: Path = argument("RUN", "run folder")
    to: str = option("--to", "hf, adapter, vllm, gguf, ollama or hub", "TARGET", str, default="hf")
    out: Path | None = option("-o --out", "folder to write; default: exports/RUN-TARGET", "DIR")
    arm: str = option("--arm", "tell or another trained arm of the run", "ARM", check_arm, default="tell")
    check: bool | None = option(
        "--check/--no-check", "compare prompts and answers with the run's; default: if possible"
    )
    quant: str = option("--quant", "q8_0, f16, bf16 or q4_k_m", "TYPE", str, "q8_0", _GGUF)
    llama_cpp: Path | None = option("--llama-cpp", "folder of llama.cpp with its converter", "DIR", panel=_GGUF)
    repo: str | None = option("--repo", "name of the new repository", "USER/NAME", panel=_HUB)
    public: bool = switch("--public", "let everybody read the repository", panel=_HUB)
    merged: bool = switch("--merged", "upload the merged model, not the adapter", panel=_HUB)
    trust_remote_code: bool = trust_switch()
    trust_scorer: bool = switch("--trust-scorer", "score by the run's own function (task.scorer)")
    as_json: bool = json_switch()


@takes_options
def export(options: ExportFlags) -> None:
    """Export a run for other servers, and check that export.

    Exit code 1: what was written differs from the run.
    """
    import tell
    from tell.run.claim import Trust

    def work(display: Display) -> dict:
        return tell.export(
            options.run,
            options.to,
            out=options.out,
            arm=options.arm,
            check=options.check,
            options=tell.ExportOptions(
                quant=options.quant,
                llama_cpp=options.llama_cpp,
                repo=options.repo,
                public=options.public,
                merged=options.merged,
                trust=Trust(options.trust_remote_code, options.trust_scorer),
            ),
            display=display,
        )

    found = show(options.as_json, work, _show)
    if found["check"]["passed"] is False:
        raise typer.Exit(1)


def _show(console: Console, found: dict) -> None:
    from rich.text import Text

    from tell.metric_names import metric
    from tell.number_text import show as shown
    from tell.number_text import show_interval

    lines, check = [found["folder"]], found["check"]
    if (prompts := check.get("prompts")) is not None:
        answers = check["answers"]
        spec, gap = metric(answers["metric"]), answers["difference"]
        lines.append(f"{check['runtime']}: {prompts['equal']:,} of {prompts['n']:,} prompts have the run's token ids")
        lines.append(
            f"{spec.label} of {answers['n']} answers: {shown(answers['exported']['value'], spec.unit)}, "
            f"the run {shown(answers['run']['value'], spec.unit)}; "
            f"difference {shown(gap['value'], spec.gap_unit, sign=True)} "
            f"({show_interval(gap['ci'], spec.gap_unit, sign=True)}); {answers['same']} are the same"
        )
        lines += [] if check["passed"] else ["It differs from the run."]
    else:
        lines.append(f"{'not checked' if check['passed'] is None else 'the check failed'}: {check['why']}")
    for line in (*lines, *found["next"]):
        console.print(Text(line), soft_wrap=True)
