"""The colours of every picture in this repository, and what tells lines and bars apart without any.

Colours: Okabe and Ito's palette for all kinds of colour vision (https://jfly.uni-koeln.de/color/). Where many
stand side by side some come close to each other, so that no picture goes by colour alone.
"""

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW, BLACK = "#E69F00", "#56B4E9", "#F0E442", "#000000"

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)  # yellow is too light for a line on white
METHOD_COLOURS = (BLACK, *COLOURS[:-1])  # supervised, FixMatch, GapMatch: the same in every picture, and far apart
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--")
