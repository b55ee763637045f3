"""The course's figures: one style, read in colour, in grey, on a light and on a dark page.

Each function takes data and returns a matplotlib `Figure` with labelled axes, units and an
alternative text in `figure.alt`. `show` puts it into a notebook as a PNG whose bytes depend on
nothing but the picture, with the alternative text beside it.

A module holds one family of pictures: `stacked`, `formats`, `weights`, `scales`, `gradients`,
`devices`, `sweeps` and `runs`. All draw in one style, and all their names are here: a chapter says
`from qlora_lab import plots`, then `plots.spine()`.

Four choices, and what the others would cost:

1. *An opaque white figure, not a transparent one.* Text needs a contrast of 4.5 to 1 (WCAG AA).
   On white that asks for a luminance of at most 0.183, on a page of #121212 for at least 0.202:
   no colour does both, so text on a transparent figure is too faint somewhere. Inside its own
   white rectangle it has its full contrast in every viewer. The web book, which knows its mode,
   turns the picture dark with one CSS rule (`DARK_FILTER`): white becomes the page's #121212, and
   each colour keeps its hue.
2. *Colours that differ in lightness*, not in hue alone, from L* 24 to 88 in steps of 6 or more:
   the same picture printed in grey still tells its parts apart. Hatches, markers and direct labels
   say it again. The hues stay apart for colour-blind readers, too (the tests simulate three kinds).
3. *The same slice has the same colour in every chapter*: `COLORS` is by meaning.
4. *No pyplot.* A `Figure` made directly belongs to no global state: nothing is drawn twice, no
   window opens, and a notebook's figures do not depend on the order of its cells.

Source: Okabe and Ito, Color Universal Design (2008), for the hues; WCAG 2.2, success criteria
1.4.1, 1.4.3 and 1.4.11.
"""

from qlora_lab.plots._style import (
    BACKGROUND,
    COLORS,
    DARK_FILTER,
    DARK_PAGE,
    DASHES,
    FAINT,
    GRID,
    HATCHES,
    INK,
    MARKERS,
    SEQUENCE,
    SLICES,
    STYLE,
    WIDTH,
    contrast,
    png,
    show,
    styled,
)
from qlora_lab.plots.devices import shared_columns
from qlora_lab.plots.formats import code_histogram, codebook_ruler, error_bars_by_bits, qq_plot
from qlora_lab.plots.gradients import curves, gradient_cards
from qlora_lab.plots.runs import grade_table_bars, loss_curve
from qlora_lab.plots.scales import error_by_storage, histogram
from qlora_lab.plots.stacked import PAGED, STEPS, ledger_slices, memory_bars, spine
from qlora_lab.plots.sweeps import bands, seed_dots
from qlora_lab.plots.weights import bell_slices, differences, half_bytes, weights_and_marks

# In the order in which the API page shows them.
__all__ = [
    "BACKGROUND",
    "INK",
    "FAINT",
    "GRID",
    "DARK_PAGE",
    "DARK_FILTER",
    "COLORS",
    "SLICES",
    "SEQUENCE",
    "MARKERS",
    "DASHES",
    "HATCHES",
    "WIDTH",
    "STYLE",
    "styled",
    "png",
    "show",
    "contrast",
    "PAGED",
    "STEPS",
    "spine",
    "memory_bars",
    "ledger_slices",
    "codebook_ruler",
    "code_histogram",
    "error_bars_by_bits",
    "qq_plot",
    "weights_and_marks",
    "bell_slices",
    "half_bytes",
    "differences",
    "histogram",
    "error_by_storage",
    "gradient_cards",
    "curves",
    "shared_columns",
    "bands",
    "seed_dots",
    "loss_curve",
    "grade_table_bars",
]
