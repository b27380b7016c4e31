"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from lightning_tta.report.blocks import Block, Grid, Note, Section
from lightning_tta.report.style import COLOURS, GRID, INK, MUTED, PAPER, Look, swatch

CSS = """
:root { color-scheme: light dark; --ink: %(ink)s; --muted: %(muted)s; --grid: %(grid)s; --paper: %(paper)s;
  --raised: #f4f5f7; --warn: #fff3d6; --edge: #b26a00; %(colours)s }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9eaec; --muted: #9299a3; --grid: #363b43; --paper: #14161a; --raised: #1e2127; --warn: #3a2c0d;
    --edge: #e0a030; --c1: #4a9fd8; --c2: #ec7a2c; --c3: #20b58a; --c7: #a98adb; --c8: #c08f70; --c9: #a9a93c;
    --c10: #ee5aa6 } }
@media print { :root { color-scheme: light } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 1rem clamp(.75rem, 3vw, 2rem) 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem;
  border-top: 1px solid var(--grid); padding-top: 1rem } h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .5rem 0; list-style: none }
a { color: inherit; text-underline-offset: .15em } p { margin: .5rem 0; max-width: 50rem }
.warning { background: var(--warn); border-left: 4px solid var(--edge); padding: .45rem .8rem; max-width: none }
.scroll { overflow-x: auto; margin: .6rem 0; /* a shade at the edge says that there is more */
  background: linear-gradient(to left, var(--paper) 40%%, transparent) right / 3rem 100%% no-repeat local,
    linear-gradient(to left, var(--grid), transparent) right / 1.5rem 100%% no-repeat scroll }
 table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid) }
th { font-weight: 600; border-bottom: 2px solid var(--muted) } .text { text-align: left }
td.long { white-space: normal; min-width: 12rem; max-width: 46rem; overflow-wrap: anywhere }
tr > :first-child { position: sticky; left: 0; background: var(--paper) }
tbody tr:hover > * { background: var(--raised) } td.clear { font-weight: 700 }
tr.all td { font-weight: 600; border-top: 2px solid var(--muted) }
figcaption, .caption { color: var(--muted); font-size: .875rem }
figure { margin: .8rem 0 } .pictures { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem }
.pictures > div { flex: 0 1 auto; max-width: 100%% } .pictures svg { max-width: 100%%; height: auto; display: block }
.wide > div { flex: 1 1 100%%; overflow-x: auto } .wide svg { width: 100%%; min-width: 42rem; max-width: none }
figure svg * { stroke-linejoin: round; stroke-linecap: butt }
.swatch { vertical-align: -.1em; margin-right: .5em }
"""


def page(title: str, subtitle: str, sections: Sequence[Section], looks: Mapping[str, Look]) -> str:
    """The whole page."""
    colours = {"ink": INK, "muted": MUTED, "grid": GRID, "paper": PAPER}
    colours["colours"] = "; ".join(f"--c{number}: {colour}" for number, colour in enumerate(COLOURS) if number)
    links = "".join(
        f'<li><a href="#s{place}">{escape(section.title)}</a></li>'
        for place, section in enumerate(sections)
        if section.level == 2
    )
    body = "\n".join(_section(section, place, looks) for place, section in enumerate(sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS % colours}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>\n<nav><ul>{links}</ul></nav>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _section(section: Section, place: int, looks: Mapping[str, Look]) -> str:
    blocks = "\n".join(_block(block, looks) for block in section.blocks)
    return f'<h{section.level} id="s{place}">{escape(section.title)}</h{section.level}>\n{blocks}'


def _block(block: Block, looks: Mapping[str, Look]) -> str:
    if isinstance(block, Note):
        return f"<p{_kind('warning') if block.warning else ''}>{escape(block.text)}</p>"
    if isinstance(block, Grid):
        return _table(block, looks)
    items = ""
    for what, svg in block.items:
        named = f'<svg role="img" aria-label="{escape(what)}"'
        items += f"<div>{svg.replace('<svg', named, 1)}</div>\n"
    kind = _kind("pictures", "wide") if block.wide else _kind("pictures")
    return f"<figure><div{kind}>{items}</div><figcaption>{escape(block.caption)}</figcaption></figure>"


def _kind(*names: str) -> str:
    return f' class="{" ".join(names)}"' if names else ""


def _table(grid: Grid, looks: Mapping[str, Look]) -> str:
    def cell(tag: str, text: str, place: int) -> str:
        long = tag == "td" and len(text) > 44
        kinds = ["text"] * (place < grid.left) + ["long"] * long + ["clear"] * text.endswith("*")
        look = looks.get(text) if grid.methods and place == 0 and tag == "td" else None
        return f"<{tag}{_kind(*kinds)}>{swatch(look) if look else ''}{escape(text)}</{tag}>"

    head = "".join(cell("th", name, place) for place, name in enumerate(grid.header))
    rows = "\n".join(
        f"<tr{_kind('all') if row[0] == 'all' else ''}>"
        + "".join(cell("td", text, place) for place, text in enumerate(row))
        + "</tr>"
        for row in grid.rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if any(grid.header) else ""
    return (
        f'<div class="scroll"><table>{top}<tbody>\n{rows}\n</tbody></table></div>\n'
        f'<p class="caption">{escape(grid.caption)}</p>'
    )
