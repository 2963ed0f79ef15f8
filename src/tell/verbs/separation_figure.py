"""The t-SNE picture of task and general queries, without and with the anchor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tell.anchor.separation import CONTRASTS
from tell.errors import TellError
from tell.files import atomic_path
from tell.folder import RunFolder

# Okabe and Ito's colours, each with its own shape
GROUPS = {
    "task": ("#D55E00", "o"),
    "task + anchor": ("#D55E00", "o"),
    "general + anchor": ("#009E73", "s"),
    "general": ("#0072B2", "^"),
}
TITLES = {"control": "control: anchor on general queries"}


def draw(result: dict, folder: Path) -> None:
    """Write ``separation.svg`` and ``separation.png`` from the content of ``separation.json``.

    Raises:
        TellError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TellError(
            "matplotlib is not installed", where="separation", remedy='pip install "tell-llm[study]"'
        ) from error
    picture = result["picture"]
    places: dict[str, Any] = picture["places"]
    figure = Figure(figsize=(3.7 * len(places), 4.3), layout="constrained")
    panels = figure.subplots(1, len(places), squeeze=False)[0]
    for panel, (name, points) in zip(panels, places.items(), strict=True):
        half = len(points) // 2
        for group, part in zip(CONTRASTS[name], (points[:half], points[half:]), strict=True):
            colour, marker = GROUPS[group]
            xs, ys = zip(*part, strict=True)
            panel.scatter(xs, ys, s=22, c=colour, marker=marker, alpha=0.8, linewidths=0, label=group)
        panel.set(xticks=[], yticks=[], title=TITLES.get(name, name))
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, frameon=False, handletextpad=0.2)
        panel.set_xlabel(_caption(result, str(picture["layer"]), name), fontsize=9, labelpad=26)
    kind = "last prompt token" if result["state"] == "last" else "mean over the prompt"
    arm = f" + {result['adapter']}" if result["adapter"] else ""
    figure.suptitle(f"{result['model']}{arm}, layer {picture['layer']}, {kind}; t-SNE", fontsize=11)
    with matplotlib.rc_context({"svg.hashsalt": "tell", "svg.fonttype": "none"}):  # reproducible bytes
        for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            with atomic_path(RunFolder(folder).separation(kind)) as path:
                figure.savefig(path, format=kind, **options)


def _caption(result: dict, layer: str, name: str) -> str:
    numbers = result["layers"][layer][name]
    low, high = numbers["probe"]["ci"]
    return (
        f"probe {numbers['probe']['value']:.0%} [{low:.0%}, {high:.0%}], length alone "
        f"{result['length'][name]['value']:.0%}\nsilhouette {numbers['silhouette']['value']:.2f}, "
        f"MMD² {numbers['mmd2']['value']:.3f} (p = {numbers['mmd2']['p']:.2g})"
    )
