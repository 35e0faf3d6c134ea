"""What matplotlib draws, as part of a page: names and colours of its own, no addresses, titles to hover over."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from html import escape
from xml.etree import ElementTree

from edgepet.reports.tables import printable

# A chart is drawn in these, and the page says what they are in light and in dark; black becomes its text's colour.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#5f5fd3")
_INK = "#000000"
_DROPPED = ("metadata", "style")
_THE_PAGES = ("stroke-linejoin", "stroke-linecap", "font-family")  # which the page's own style says
_TURNED_BY_NONE = re.compile(r"rotate\(-?0 [^)]*\)")
_NUMBER = re.compile(r"-?\d+\.\d+")
_STYLED = re.compile(r'style="([^"]*)"')
_USED = re.compile(r"url\(#([^)]+)\)")


def inline(drawn: bytes, key: str, title: str, told: str, hover: Mapping[str, str]) -> str:
    """An ``<svg>`` element for HTML.

    Args:
        drawn: an SVG file of matplotlib's.
        key: what the names in it begin with: no two elements of a page may have one name.
        title: its accessible name.
        told: its accessible description, a sentence that says what is to be seen.
        hover: texts that appear over elements, by their ``gid``.
    """
    root = ElementTree.fromstring(drawn)
    used = {href[1:] for node in root.iter() if (href := _href(node)) is not None}
    used |= {name for node in root.iter() for value in node.attrib.values() for name in _USED.findall(value)}
    names = {name: f"{key}-{number}" for number, name in enumerate(sorted(used))}
    body = "".join(_written(node, names, hover) for node in root)
    label = f'role="img" aria-labelledby="{key}-t {key}-d"'
    told_of = f'<title id="{key}-t">{_text(title)}</title><desc id="{key}-d">{_text(told)}</desc>'
    return f'<svg viewBox="{root.attrib["viewBox"]}" {label}>{told_of}{body}</svg>'


def shared(body: str) -> tuple[str, str]:
    """``body`` with classes in place of styles that come more than once, and the rules of those classes."""
    counts = Counter(_STYLED.findall(body))
    names = {style: f"s{number}" for number, style in enumerate(each for each in counts if counts[each] > 1)}
    rules = "".join(f".{name}{{{style}}}\n" for style, name in names.items())

    def named(match: re.Match[str]) -> str:
        return f'class="{names[match[1]]}"' if match[1] in names else match[0]

    return _STYLED.sub(named, body), rules


def _href(node: ElementTree.Element) -> str | None:
    return next((value for name, value in node.attrib.items() if name.endswith("}href")), None)


def _written(node: ElementTree.Element, names: Mapping[str, str], hover: Mapping[str, str], title: str = "") -> str:
    """``title`` is what hovering over the markers in ``node`` says."""
    tag = node.tag.rpartition("}")[2]
    if tag in _DROPPED:
        return ""
    title = "" if tag == "defs" else hover.get(node.attrib.get("id", ""), title)
    body = "".join(_written(each, names, hover, title) for each in node)
    body += escape(node.text.strip()) if node.text else ""
    body += f"<title>{_text(title)}</title>" if title and tag == "use" else ""
    attributes = "".join(f' {name}="{escape(value)}"' for name, value in _attributes(node, names))
    if tag in ("g", "defs") and not body:
        return ""
    if tag == "g" and not attributes:
        return body
    return f"<{tag}{attributes}/>" if not body else f"<{tag}{attributes}>{body}</{tag}>"


def _text(text: str) -> str:
    return escape(printable(text))


def _attributes(node: ElementTree.Element, names: Mapping[str, str]) -> list[tuple[str, str]]:
    kept = []
    for full, value in node.attrib.items():
        name = full.rpartition("}")[2]
        if name == "id":
            if value in names:
                kept.append((name, names[value]))
        elif name == "href":
            kept.append((name, f"#{names[value[1:]]}"))
        elif name == "style":
            if style := _style(value):
                kept.append((name, style))
        elif not _TURNED_BY_NONE.fullmatch(value):
            told = _USED.sub(lambda match: f"url(#{names[match[1]]})", value)
            short = _NUMBER.sub(lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), told)
            kept.append((name, " ".join(short.split())))
    return kept


def _style(text: str) -> str:
    """Colours as the page has them; of a font only its size, for the page has one of its own."""
    kept = []
    for part in text.split(";"):
        name, _, value = (each.strip() for each in part.partition(":"))
        if name == "font":
            size = re.search(r"[\d.]+px", value)
            kept.append(f"font-size:{size[0] if size else '12px'}")
            if "bold" in value:
                kept.append("font-weight:bold")
        elif name and name not in _THE_PAGES:
            kept.append(f"{name}:{_colour(value)}")
    return ";".join(kept)


def _colour(value: str) -> str:
    if value in COLOURS:
        return f"var(--c{COLOURS.index(value)})"
    return "currentColor" if value == _INK else value
