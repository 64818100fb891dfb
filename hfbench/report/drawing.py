"""Drawing for the report: one drawing serves the light page, the dark page and a file.

Matplotlib draws with sentinel colours. In the page they become CSS variables, so that a figure
follows its theme; in a file they become the light theme's colours.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter

from hfbench.errors.harmless import for_terminal

# Name of the CSS variable -> light, dark. Text and lines: contrast at least 4.5 and 3 on the
# background (WCAG 2.2, 1.4.3 and 1.4.11). Series differ in lightness too, for readers who do not
# see colours, and always in marker or hatch.
THEME = {
    "background": ("#ffffff", "#14171c"),
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#59636e", "#a3adb8"),
    "grid": ("#d5dae0", "#363d47"),
    "series-1": ("#0b62a8", "#6cb6ff"),
    "series-2": ("#b34700", "#ffa657"),
    "series-3": ("#00704d", "#4fd1a1"),
    "series-4": ("#8a3f86", "#e3a1df"),
    "series-5": ("#7a6400", "#e6d06a"),
    "series-6": ("#4d5560", "#c3ccd6"),
}
# Matplotlib never writes these by itself.
SENTINELS = {name: f"#fe{number:02x}fd" for number, name in enumerate(THEME, start=1)}
SERIES = [color for name, color in SENTINELS.items() if name.startswith("series")]
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, MUTED, GRID = SENTINELS["ink"], SENTINELS["muted"], SENTINELS["grid"]
BACKGROUND = SENTINELS["background"]
_FONTS = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
WIDTH = 800  # pixels of most figures
LABEL = 30  # characters in a line beside an axis
LEGEND = 44  # the same in a legend of two columns
_LONGEST_CLASS = 24
_DPI = 72  # of matplotlib's SVG, so that a point is a pixel
STYLE: dict[Any, Any] = {  # any: a key may be new in the next matplotlib
    "svg.fonttype": "none",
    "svg.hashsalt": "hfbench",
    "font.family": "DejaVu Sans",
    "font.size": 12.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "figure.labelsize": 12.0,
    "axes.titlesize": 12.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "lines.markersize": 7.0,
    "text.parse_math": False,  # a class may be called $x$
}


def canvas(width: float, height: float) -> Canvas:
    """Return an empty figure; draw inside ``rc_context(STYLE)``.

    Args:
        width: In pixels of the page; fonts and lines are in pixels too.
        height: The same.
    """
    # Gaps between several axes, or the last number of one would touch the first of the next.
    layout = ConstrainedLayoutEngine(wspace=0.05, hspace=0.05)
    return Canvas(figsize=(width / _DPI, height / _DPI), layout=layout)


def in_lines(name: str, width: int) -> str:
    """Break a recipe's name into lines, after its dots, dashes and underscores.

    Args:
        name: May be 96 characters long.
        width: Of a line, in characters.
    """
    lines = [""]
    for part in re.findall(rf".{{0,{width - 1}}}?[._ -]|.{{1,{width}}}", name):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def cut(name: str, longest: int = _LONGEST_CLASS) -> str:
    """Cut a name to what fits on one line, such as that of a class beside an axis."""
    name = " ".join(name.split())
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def plain_ticks(axis: Any, unit: str) -> None:
    """Label a logarithmic axis with plain numbers, also when it spans less than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.set_minor_formatter(NullFormatter())


def time_ticks(axis: Any, low: float, high: float) -> str:
    """Label a linear axis of seconds in seconds, minutes or hours, whichever suits its length.

    Args:
        axis: Of matplotlib.
        low: Smallest value on it, in seconds.
        high: Largest value on it, in seconds.

    Returns:
        The unit.
    """
    divisor, unit = (1, "s") if high < 600 else (60, "min") if high < 4 * 3600 else (3600, "h")
    rough = max(high - low, 1e-3) / divisor / 8
    decade = 10.0 ** math.floor(math.log10(rough))
    step = next(decade * factor for factor in (1, 2, 5, 10) if decade * factor >= rough)
    axis.set_major_locator(MultipleLocator(step * divisor))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / divisor:g}"))
    return unit


def to_svg(figure: Canvas, name: str) -> str:
    """Write a drawing as an ``<svg>`` element with sentinel colours and ids of its own.

    Args:
        figure: The drawing.
        name: Starts each id, so that several drawings fit on one page.
    """
    buffer = io.StringIO()
    with rc_context(STYLE), warnings.catch_warnings():
        # The page's reader has other fonts than matplotlib, which only measures the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # What follows is taken out again below; without a date the same data give the same file.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = for_terminal(buffer.getvalue())  # controls are no XML either
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = svg.replace("'DejaVu Sans'", _FONTS)
    width, height = (round(inches * _DPI) for inches in figure.get_size_inches())
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', rf'\1width="{width}" height="{height}"', svg)
    return re.sub(r"\n\s*", "\n", svg).strip()


def for_page(svg: str) -> str:
    """Let a drawing follow the theme of the page that it stands in."""
    for name, sentinel in SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{name})")
    return svg


def for_file(svg: str) -> str:
    """Give a drawing the light theme's colours and a background, for a file of its own."""
    for name, sentinel in SENTINELS.items():
        svg = svg.replace(sentinel, THEME[name][0])
    end = svg.index(">") + 1
    rectangle = f'<rect width="100%" height="100%" fill="{THEME["background"][0]}"/>'
    return f"{svg[:end]}{rectangle}{svg[end:]}\n"
