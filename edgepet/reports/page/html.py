"""A page as one HTML file: no script, no request, light and dark, on paper and on a phone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from edgepet.reports.page.charts import drawn
from edgepet.reports.page.parts import FAILED, MISSING, REFUSED, Figure, Folded, Items, Part, Section, Text
from edgepet.reports.page.svg import shared
from edgepet.reports.tables import Table, printable

LONG = 28  # letters of a cell that is not wrapped
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1b1b;--soft:#555;--line:#cfcfcf;--band:#f4f4f2;--bad:#b00020;
--c0:#0072b2;--c1:#c24f00;--c2:#00805e;--c3:#b0467f;--c4:#7a5f00;--c5:#5050c8}
@media (prefers-color-scheme:dark){:root{--paper:#15171b;--ink:#e9e9e6;--soft:#b0b4ba;--line:#40454d;--band:#1f2227;
--bad:#ff8f85;--c0:#5cb8ee;--c1:#ff9552;--c2:#3fcfa0;--c3:#ee93c2;--c4:#d9b84a;--c5:#a9a9ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:74rem;padding:1rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.3rem;margin:2.2rem 0 .5rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1.02rem;margin:.4rem 0}
p{margin:.5rem 0;max-width:70ch}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;list-style:none;padding:0;margin:.6rem 0}
a{color:var(--c0)}nav a{display:inline-block;padding:.15rem 0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));gap:1.2rem 1.6rem}
figure{margin:.4rem 0;min-width:0;break-inside:avoid}
svg{display:block;width:100%;max-width:31rem;height:auto;overflow:visible}
svg *{stroke-linejoin:round}
svg text{fill:currentColor}
code{font-size:.95em}
figcaption,.soft{color:var(--soft);font-size:.92rem}
details{margin:.4rem 0}summary{cursor:pointer;padding:.2rem 0}
.scroll{overflow-x:auto;max-width:100%;margin:.5rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.22rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td{white-space:nowrap}td.w{white-space:normal;min-width:16rem;max-width:34rem}
thead th{border-bottom:2px solid var(--line)}tbody tr:nth-child(even){background:var(--band)}
main ul{padding-left:1.2rem;max-width:90ch}li{margin:.25rem 0}
.n{text-align:right;white-space:nowrap}
.bad{color:var(--bad);font-weight:600}.none{color:var(--soft);font-style:italic}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
@media print{body{max-width:none;padding:0;font-size:10pt}nav{display:none}.scroll{overflow:visible}
td,th,td.w{padding:.1rem .3rem;min-width:0;white-space:normal}
tr,svg{break-inside:avoid}svg{max-width:20rem}h2,h3{break-after:avoid}summary{display:none}
details::details-content{content-visibility:visible;block-size:auto}table{font-size:7.5pt}}
"""


def page(title: str, told: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole file; the same sections give the same characters.

    Raises:
        MissingError: there is a chart, and matplotlib is not installed.
    """
    links = "".join(f'<li><a href="#{each.key}">{escape(each.title)}</a></li>' for each in sections)
    body = "".join(_section(each, chr(ord("a") + number)) for number, each in enumerate(sections))
    body, rules = shared(body)
    first = "".join(f"<p>{_prose(each)}</p>" for each in told)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<style>{_STYLE}{rules}</style>\n</head>\n<body>\n<header>\n<h1>{_text(title)}</h1>\n{first}\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main>\n{body}</main>\n</body>\n</html>\n'
    )


def _section(section: Section, key: str) -> str:
    body = "".join(_parts(section, key))
    heading = f'<h2 id="{section.key}">{escape(section.title)}</h2>'
    return f'<section aria-labelledby="{section.key}">\n{heading}\n{body}</section>\n'


def _parts(section: Section, key: str) -> Iterator[str]:
    """Every part; charts that follow one another stand side by side where there is room. ``key`` begins their names."""
    row = list[str]()
    for number, part in enumerate(section.parts):
        if isinstance(part, Figure):
            row.append(_figure(part, f"{key}{number}"))
            continue
        yield _row(row)
        row.clear()
        yield _plain(part)
    yield _row(row)


def _row(figures: Sequence[str]) -> str:
    return f'<div class="charts">\n{"".join(figures)}</div>\n' if figures else ""


def _plain(part: Part) -> str:
    if isinstance(part, Text):
        kind = f' class="{_class(part.mark)}"' if part.mark else ""
        return f"<p{kind}>{_prose(part.text)}</p>\n"
    if isinstance(part, Items):
        return f"<ul>{''.join(_item(text) for text in part.texts)}</ul>\n"
    if isinstance(part, Folded):
        return _folded(part.table, part.table.title)
    return f"<h3>{_text(part.title)}</h3>\n{_table(part)}" if isinstance(part, Table) else ""


def _item(text: str) -> str:
    """The word that marks it in its colour, and the rest."""
    mark, colon, rest = text.partition(": ")
    kind = _class(text)
    return (
        f'<li><span class="{kind}">{_text(mark)}</span>{colon}{_text(rest)}</li>' if kind else f"<li>{_text(text)}</li>"
    )


def _figure(figure: Figure, key: str) -> str:
    table = _folded(figure.table, f"The numbers: {figure.table.title}")
    caption = f"<figcaption>{_text(figure.told)}</figcaption>"
    return f"<figure>\n<h3>{_text(figure.title)}</h3>\n{drawn(figure, key)}\n{caption}\n{table}</figure>\n"


def _folded(table: Table, summary: str) -> str:
    return f"<details>\n<summary>{_text(summary)}</summary>\n{_table(table)}</details>\n"


def _table(table: Table) -> str:
    """A table in a box that scrolls by itself, and takes the keyboard's arrows for it; its title stands in front."""
    numbers = [column.right for column in table.columns]
    head = "".join(
        f'<th scope="col"{_number(right)}>{_text(column.heading)}</th>'
        for column, right in zip(table.columns, numbers, strict=True)
    )
    rows = "\n".join(
        f"<tr>{''.join(_cell(cell, right) for cell, right in zip(row, numbers, strict=True))}</tr>"
        for row in table.rows
    )
    title = _text(table.title)
    return (
        f'<div class="scroll" role="group" tabindex="0" aria-label="{title}"><table aria-label="{title}">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>\n"
    )


def _cell(text: str, right: bool) -> str:
    kinds = [kind for kind in ("n" if right else "", "w" if len(text) > LONG else "", _class(text)) if kind]
    return f"<td{_classes(kinds)}>{_text(text)}</td>"


def _number(right: bool) -> str:
    return ' class="n"' if right else ""


def _classes(kinds: Sequence[str]) -> str:
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _class(text: str) -> str:
    if text.startswith((FAILED, REFUSED)):
        return "bad"
    return "none" if text.startswith((MISSING, "not run")) else ""


def _prose(text: str) -> str:
    """A paragraph, in which commands stand in backquotes."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", _text(text))


def _text(text: str) -> str:
    """Names and reasons come from files: control characters are replaced, and nothing in them is markup."""
    return escape(printable(text))
