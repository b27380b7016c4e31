"""How methods look, everywhere the same; and figures as SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

# The source alone is black. The next six are Okabe and Ito's, safe for colour-blind readers; without their yellow,
# which white paper swallows. Line styles and markers tell methods apart in greyscale.
COLOURS = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#6A3D9A", "#8C5A3C", "#808000", "#D6207F", "#7CB518"),
)
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
KNOWN = (
    *("source", "norm", "tent", "zerosiam", "eata", "eta", "sar", "deyo", "come", "ostta", "lame", "t3a", "cotta"),
    *("meta_ttt", "memo", "view_averaging", "single_image_bn", "zero"),
)
"""Methods with a place of their own; other labels get one by their name, so that they too keep it."""

PLACES = (len(COLOURS) - 1) * len(STYLES) * len(MARKERS)  # coprime: all combinations come once
INK, MUTED, GRID, PAPER = "#16181d", "#6d737c", "#d9dce1", "#ffffff"  # in the light; the page has them by name
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", "#000000": "ink"} | {
    colour.lower(): f"c{number}" for number, colour in enumerate(COLOURS) if number
}


@dataclass(frozen=True)
class Look:
    """Colour, line style and marker of a method, as matplotlib takes them."""

    colour: str
    line: str
    marker: str

    @property
    def in_page(self) -> str:
        """The colour for a figure of the page, where black is the page's ink."""
        return INK if self.colour == COLOURS[0] else self.colour


def look_at(place: int) -> Look:
    """The look of a place; the source has place 0."""
    colour = COLOURS[1 + (place - 1) % (len(COLOURS) - 1)] if place else COLOURS[0]
    return Look(colour, STYLES[place % len(STYLES)], MARKERS[place % len(MARKERS)])


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each method: by its name alone, unless two names of one page fall on the same."""
    names = list(dict.fromkeys(methods))
    places = {name: KNOWN.index(name) for name in names if name in KNOWN}
    for name in sorted(set(names) - set(places)):
        place = len(KNOWN) + crc32(name.encode()) % (PLACES - len(KNOWN))
        while place in places.values() and len(places) < PLACES // 2:
            place = 1 + place % (PLACES - 1)  # never the source's
        places[name] = place
    return {name: look_at(places[name]) for name in names}


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib set up for the page: text stays text, ink from the page."""
    import matplotlib

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "lightning_tta",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
        "font.size": 9,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.titlesize": 9,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
    }
    with matplotlib.rc_context(settings):
        yield


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an inline SVG element: colours are the page's variables, the ids it needs begin with ``name``."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'\bhref="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        text = re.sub(colour, f"var(--{variable})", text, flags=re.IGNORECASE)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    return re.sub(r"\n\s*", "\n", text).strip()


def save_png(figure: Figure, path: Path) -> None:
    """The figure as a picture, in the page's light look."""
    figure.savefig(path, dpi=130, facecolor=PAPER, bbox_inches="tight")


_SHAPES = {
    "o": '<circle cx="17" cy="6" r="3.4"/>',
    "s": '<path d="M14 3h6v6h-6z"/>',
    "^": '<path d="M17 2l4 7.5h-8z"/>',
    "v": '<path d="M17 10l4-7.5h-8z"/>',
    "<": '<path d="M13 6l7.5-4v8z"/>',
    ">": '<path d="M21 6l-7.5-4v8z"/>',
    "D": '<path d="M17 1.8l4.2 4.2-4.2 4.2-4.2-4.2z"/>',
    "P": '<path d="M15.5 2h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z"/>',
    "X": '<path d="M14.2 3.2l1.3-1.3L17 3.5l1.5-1.6 1.3 1.3L18.3 6l1.5 2.8-1.3 1.3L17 8.5l-1.5 1.6-1.3-1.3L15.7 6z"/>',
}
_DASHES = {"-": "", "--": "7 4", "-.": "8 3 2 3", ":": "2 3"}


def swatch(look: Look) -> str:
    """A short line with the marker, to stand beside the method's name."""
    colour = f"var(--{VARIABLES[look.colour.lower()]})"
    dashes = f' stroke-dasharray="{_DASHES[look.line]}"' if _DASHES[look.line] else ""
    return (
        f'<svg class="swatch" width="34" height="12" viewBox="0 0 34 12" aria-hidden="true"><path d="M0 6h34" '
        f'style="stroke:{colour};stroke-width:2;fill:none"{dashes}/><g style="fill:{colour}">{_SHAPES[look.marker]}</g>'
        "</svg>"
    )
