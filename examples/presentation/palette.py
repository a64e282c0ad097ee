"""The colours of every picture in this repository, and what tells lines and bars apart without any.

Colours: Okabe and Ito's palette for all kinds of colour vision (https://jfly.uni-koeln.de/color/). Where many
stand side by side some come close to each other, so that no picture goes by colour alone.
"""

from collections.abc import Iterable
from typing import Any

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW, BLACK = "#E69F00", "#56B4E9", "#F0E442", "#000000"

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)  # yellow is too light for a line on white
METHOD_COLOURS = (BLACK, *COLOURS[:-1])  # supervised, FixMatch, GapMatch: the same in every picture, and far apart
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--")

FAMILIAR = ("Supervised", "FixMatch", "GapMatch")


def method_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method's line, for at most seven: the familiar three always look the same."""
    styles = [{"color": colour, "marker": marker} for colour, marker in zip(METHOD_COLOURS, MARKERS, strict=True)]
    names = list(names)
    own = {name: style for name, style in zip(FAMILIAR, styles, strict=False) if name in names}
    free = (style for style in styles if style not in own.values())
    return {name: own[name] if name in own else next(free) for name in names}
