"""The result as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what `bench.__main__.measure` returns."""
    console = console or Console()
    facts = result["facts"]
    machine = facts["machine"]
    console.print(
        f"{facts['model']}, {facts['dtype']}, {machine['cpu']}, {machine['cores']} cores, {machine['device']}"
    )
    for part, title in (("train", "Training"), ("decode", "Decoding")):
        if part in result:
            console.print(_engines(title, result[part], result[f"{part}_ratio"]))
            for name, it in result[part].items():
                if it["setting"]:
                    setting = ", ".join(f"{key} {value}" for key, value in it["setting"].items())
                    console.print(f"{name}: {setting}", markup=False, highlight=False)
        if part == "train" and part in result:
            ceiling = f"{result['ceiling_gflops']:,.0f} GFLOP/s"
            console.print(f"ceiling: {ceiling} in products of this model's linear layers at 2,048 rows")
    if "plan" in result:
        plan = result["plan"]
        console.print(f"tell plan, {plan['rows']:,} rows: {plan['cold_s']:.1f} s cold, {plan['warm_s']:.1f} s warm")
    for part, reasons in result["missing"].items():
        for engine, why in reasons.items():
            console.print(f"{part}: {engine} is left out: {why}", style="yellow", markup=False)


def _engines(title: str, engines: dict[str, Any], ratios: dict[str, float]) -> Table:
    table = Table(title=title)
    share = any("ceiling_share" in it for it in engines.values())
    names = ["engine", "tokens/s", "spread", "peak MB", *(["of ceiling"] if share else []), "tell is"]
    for name in names:
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for name, it in engines.items():
        low, high = it["spread"]
        row = [name, f"{it['tokens_per_s']:,.0f}", f"{low:,.0f}-{high:,.0f}"]
        row.append(f"{it.get('peak_cuda_mb', it['peak_rss_mb']):,.0f}")
        if share:
            row.append(f"{it['ceiling_share']:.1%}")
        row.append(f"{ratios[name]:.1f} x as fast" if name in ratios else "")
        table.add_row(*row)
    return table
