"""Draw the course's pictures of itself: logo, favicon and the bell curve of the landing page.

All three are computed from the NF4 table that the package proves, so the picture on the first
page is the thing and not a likeness of it. `python -m tools.draw_identity` writes them;
a test draws them again and compares.

The logo is a bell curve cut into four slices, one for each bit; the small one in the second
colour is the adapter. The landing picture cuts the same curve where NF4's rounding changes its
mind: sixteen slices, the mark that each slice is rounded to, and the four bits stored for it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import NormalDist

from qlora_lab.codebooks import midpoints, nf4

STATIC = Path(__file__).resolve().parent.parent / "book" / "_static"

BLUE, ORANGE = "#0f5c7c", "#b4520c"
BLUE_DARK, ORANGE_DARK = "#7fc4df", "#f2a65e"

# NF4 maps the quantile at probability 0.9677083 to 1, so a weight of 1 is this many sigma out.
SIGMA = 1 / NormalDist().inv_cdf(0.9677083)


def density(x: float) -> float:
    """Return the normal density at x, scaled to 1 at its top."""
    return math.exp(-0.5 * (x / SIGMA) ** 2)


def slice_path(left: float, right: float, to_x, to_y, steps: int = 12) -> str:
    """Return the SVG path of the area under the bell curve between two weights."""
    points = [left + (right - left) * step / steps for step in range(steps + 1)]
    top = " ".join(f"L{to_x(x):.1f} {to_y(density(x)):.1f}" for x in points)
    return f"M{to_x(left):.1f} {to_y(0):.1f} {top} L{to_x(right):.1f} {to_y(0):.1f} Z"


def logo(style: str) -> str:
    """Return the logo, 64 by 64, coloured by a style sheet."""

    def to_x(x: float) -> float:
        return 32 + 29 * x / 1.35

    def to_y(y: float) -> float:
        return 54 - 46 * y

    gap = 0.055
    edges = [-1.35, -0.42, 0.0, 0.42, 1.35]
    slices = []
    for index, (left, right) in enumerate(zip(edges, edges[1:], strict=False)):
        inner_left = left + (gap if index > 0 else 0)
        inner_right = right - (gap if index < 3 else 0)
        name = "b" if index == 3 else "a"
        slices.append(
            f'<path class="{name}" d="{slice_path(inner_left, inner_right, to_x, to_y)}"/>'
        )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" width="64" height="64">'
        f"<style>{style}</style>{''.join(slices)}</svg>\n"
    )


def hero() -> str:
    """Return the landing picture; its colours come from the page's style sheet."""
    table = nf4()
    width, height, floor, side = 960, 330, 250, 36
    half = (width - 2 * side) / 2 / 1.06

    def to_x(x: float) -> float:
        return width / 2 + half * x

    def to_y(y: float) -> float:
        return floor - 222 * y

    edges = [-1.06, *midpoints(table), 1.06]
    parts = []
    for code in range(len(table)):
        shape = slice_path(edges[code], edges[code + 1], to_x, to_y)
        parts.append(f'<path class="slice s{code % 2}" d="{shape}"/>')
    parts.append(f'<path class="axis" d="M{side / 2} {floor} H{width - side / 2}"/>')
    for code, value in enumerate(table):
        x = to_x(value)
        parts.append(f'<path class="stem" d="M{x:.1f} {floor} V{to_y(density(value)):.1f}"/>')
        parts.append(f'<circle class="mark" cx="{x:.1f}" cy="{floor}" r="5"/>')
        parts.append(f'<text class="bits" x="{x:.1f}" y="{floor + 27}">{code:04b}</text>')
    for value in (-1, 0, 1):
        parts.append(f'<text class="tick" x="{to_x(value):.1f}" y="{floor + 56}">{value}</text>')
    label = "weight, divided by the largest of its block"
    parts.append(f'<text class="label" x="{to_x(0.5):.1f}" y="{floor + 56}">{label}</text>')
    title = (
        "A bell curve of weights, cut into sixteen slices. Each slice holds one mark, the value "
        "that its weights are rounded to, with the four bits stored for it: 0000 at minus one, "
        "0111 at zero, 1111 at plus one. The marks stand close together near zero, where most "
        "weights are, and further apart towards the ends."
    )
    return (
        f'<svg class="hero" viewBox="0 0 {width} {height}" role="img" aria-labelledby="hero-title" '
        f'xmlns="http://www.w3.org/2000/svg"><title id="hero-title">{title}</title>'
        f"{''.join(parts)}</svg>\n"
    )


def drawings() -> dict[str, str]:
    """Return every picture under the name of its file."""
    both = (
        f".a{{fill:{BLUE}}}.b{{fill:{ORANGE}}}"
        f"@media(prefers-color-scheme:dark){{.a{{fill:{BLUE_DARK}}}.b{{fill:{ORANGE_DARK}}}}}"
    )
    return {
        "favicon.svg": logo(both),
        "logo.svg": logo(f".a{{fill:{BLUE}}}.b{{fill:{ORANGE}}}"),
        "logo-dark.svg": logo(f".a{{fill:{BLUE_DARK}}}.b{{fill:{ORANGE_DARK}}}"),
        "hero.svg": hero(),
    }


def main() -> int:
    """Write the pictures into the book."""
    for name, text in drawings().items():
        (STATIC / name).write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
