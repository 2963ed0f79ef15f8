"""Figures of matplotlib in a page: with its colours and without style attributes, which its policy forbids."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from markupsafe import Markup

from tell.studies.page.drawing import HAIR, INK, PAPER, SOFT

COLOURS = {INK: "currentColor", "#000000": "currentColor"}
COLOURS |= {SOFT: "var(--soft)", HAIR: "var(--hair)", PAPER: "var(--paper)"}
REFERENCE = re.compile(r"#([\w.-]+)")


def inline_svg(text: str, *, key: str, title: str) -> Markup:
    """The drawing as an ``<svg>`` element, in the page's colours, which may be dark.

    Args:
        text: an SVG file that `tell.studies.page.drawing.save` wrote.
        key: unique in the page; prefix of every id.
        title: for screen readers.
    """
    root = ElementTree.fromstring(text)
    width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
    for parent in list(root.iter()):
        for child in list(parent):
            name = _local(child.tag)
            if name in ("metadata", "style") or child.attrib.get("id") == "patch_1":  # the white background
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(k): v for k, v in element.attrib.items()}
        for rule in attributes.pop("style", "").split(";"):
            name, _, value = rule.partition(":")
            if value:
                attributes[name.strip()] = COLOURS.get(value.strip(), value.strip())
        if "id" in attributes:
            attributes["id"] = f"{key}-{attributes['id']}"
        for name in ("href", "clip-path"):
            if name in attributes:
                attributes[name] = REFERENCE.sub(rf"#{key}-\1", attributes[name])
        element.attrib.clear()
        element.attrib.update(attributes)
        element.text = element.text if element.text and element.text.strip() else None
        element.tail = None
    root.attrib = {
        "class": "picture",
        "role": "img",
        "aria-labelledby": f"{key}-title",
        "viewBox": f"0 0 {width:g} {height:g}",
        "width": f"{width * 4 / 3:.0f}",
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    label = ElementTree.Element("title", {"id": f"{key}-title"})
    label.text = title
    root.insert(0, label)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2] if isinstance(name, str) else name
