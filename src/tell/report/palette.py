"""The one palette, of the pages' stylesheet and of a study's figures.

Okabe and Ito's colours, darkened or lightened to a contrast of 3:1 against white and against the dark background.
"""

from __future__ import annotations

from tell.arm import Colour
from tell.names import ARMS

INK, SOFT, HAIR, PAPER = "#1a1d1f", "#565e64", "#dcdfdf", "#ffffff"
COLOURS: dict[Colour, str] = {
    "blue": "#1a7fc4",
    "orange": "#d55e00",
    "green": "#009e73",
    "pink": "#c8609a",
    "ochre": "#94771c",
    "grey": "#7d858a",
    "violet": "#7a5fc0",
}
CYCLE = tuple(COLOURS.values())
ARM_COLOURS = {arm.name: COLOURS[arm.colour] for arm in ARMS.values()}
_MARKS = {  # the same on both backgrounds
    "task": COLOURS["blue"],
    "general": COLOURS["green"],
    "other": COLOURS["violet"],
    "notice": COLOURS["ochre"],
}
_LIGHT = {
    **{"paper": "#fcfcfb", "raised": "#f4f5f4", "ink": INK, "soft": SOFT, "rule": HAIR, "hair": "#e9ebea"},
    **{"own": "#14639c", "own-wash": "#e3eef7", "bad": "#a1352b", "bad-wash": "#fbeae7"},
    **{"good": "#1c6a47", "good-wash": "#e1f1ea"},
}
_DARK = {
    **{"paper": "#15181a", "raised": "#1d2123", "ink": "#e4e6e5", "soft": "#a3abaf", "rule": "#363c3f"},
    **{"hair": "#292e31", "own": "#79bbeb", "own-wash": "#172d3f", "bad": "#f0948a", "bad-wash": "#3d2320"},
    **{"good": "#7fcfa6", "good-wash": "#19352a"},
}


def css() -> str:
    """The palette as custom properties of a stylesheet, for a light and a dark background."""
    light, dark = (
        ":root { " + " ".join(f"--{name}: {colour};" for name, colour in part.items()) + " }"
        for part in (_LIGHT | _MARKS, _DARK)
    )
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n"
