"""Draw the pictures of the toolbox page, `python -m tools.draw_toolbox`.

Three small pictures, computed from what they show: the bits of three floating-point formats, a
matrix as the sum of sheets of rank 1, and a bell curve cut at its quartiles. Their colours come
from the page's style sheet, so they follow the page into dark mode and onto paper. A test draws
them again and compares.
"""

from __future__ import annotations

import math
import sys
from statistics import NormalDist

from tools.draw_identity import STATIC

FORMATS = {"fp32": (1, 8, 23), "bf16": (1, 8, 7), "fp16": (1, 5, 10)}  # sign, exponent, fraction


def picture(name: str, width: int, height: int, title: str, parts: list[str]) -> str:
    """Return an SVG for a page: its title is read aloud, its colours are the page's."""
    return (
        f'<svg class="lab" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{name}-title" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{name}-title">{title}</title>{"".join(parts)}</svg>\n'
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Return a line of text, centred on x."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{words}</text>'


def floats() -> str:
    """Return the bits of fp32, bf16 and fp16, one row each, aligned at the sign."""
    left, cell, row = 84, 17, 58
    parts = []
    for number, (name, widths) in enumerate(FORMATS.items()):
        x, y = left, 8 + row * number
        parts.append(text(left / 2 - 4, y + 27, name, "name"))
        for kind, bits in zip(("c", "a", "b"), widths, strict=True):
            parts.append(
                f'<rect class="{kind}" x="{x}" y="{y}" width="{cell * bits}" height="40"/>'
            )
            parts.append(text(x + cell * bits / 2, y + 27, str(bits), "number"))
            x += cell * bits
    title = (
        "The bits of three formats as bars. fp32: one sign bit, 8 of exponent, 23 of fraction. "
        "bf16: the same exponent, 7 of fraction: it is the front half of fp32. fp16: 5 of "
        "exponent, 10 of fraction."
    )
    return picture("floats", left + 32 * cell + 4, 3 * row, title, parts)


def sheets() -> str:
    """Return the times table with one wrong cell, its first sheet of rank 1, and the rest."""
    n, cell, gap, top = 9, 17, 62, 4
    matrix = [[i * j for j in range(1, n + 1)] for i in range(1, n + 1)]
    matrix[0][0] += 10
    left, right, strength = leading_pair(matrix)
    first = [[strength * a * b for b in right] for a in left]
    rest = [[matrix[i][j] - first[i][j] for j in range(n)] for i in range(n)]
    parts = []
    for number, (grid, label, scale) in enumerate(
        ((matrix, "the matrix", 81), (first, "first sheet", 81), (rest, "the rest, × 8", 81 / 8))
    ):
        x0 = 4 + number * (n * cell + gap)
        parts.append(
            f'<rect class="frame" x="{x0}" y="{top}" width="{n * cell}" height="{n * cell}"/>'
        )
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                shade = min(1.0, abs(value) / scale)
                if shade >= 0.005:
                    parts.append(
                        f'<rect class="cell" x="{x0 + j * cell}" y="{top + i * cell}" '
                        f'width="{cell}" height="{cell}" fill-opacity="{shade:.2f}"/>'
                    )
        parts.append(text(x0 + n * cell / 2, top + n * cell + 27, label, "number"))
        if number < 2:
            sign = "=" if number == 0 else "+"
            parts.append(text(x0 + n * cell + gap / 2, top + n * cell / 2 + 10, sign, "name sign"))
    title = (
        "Three grids of nine by nine cells. The matrix grows darker to the lower right, with a "
        "corner at the upper left that is too dark. Its first sheet has the same shading without "
        "that corner. The rest, drawn eight times as dark, is the corner and nearly nothing else."
    )
    return picture("sheets", 8 + 3 * n * cell + 2 * gap, top + n * cell + 38, title, parts)


def leading_pair(matrix: list[list[float]]) -> tuple[list[float], list[float], float]:
    """Return the first singular vectors and value, by power iteration."""
    right = [1.0] * len(matrix[0])
    for _ in range(50):
        left = [sum(a * b for a, b in zip(row, right, strict=True)) for row in matrix]
        size = math.hypot(*left)
        left = [a / size for a in left]
        right = [sum(row[j] * a for row, a in zip(matrix, left, strict=True)) for j in range(9)]
        strength = math.hypot(*right)
        right = [b / strength for b in right]
    return left, right, strength


def quartiles() -> str:
    """Return a bell curve in four slices of equal mass, with the quantiles between them."""
    width, floor, height, reach = 640, 178, 168, 2.9
    normal = NormalDist()

    def to_x(z: float) -> float:
        return width / 2 + z * width / 2 / reach

    cuts = [-reach, *(normal.inv_cdf(p) for p in (0.25, 0.5, 0.75)), reach]
    parts = []
    for number, (low, high) in enumerate(zip(cuts, cuts[1:], strict=False)):
        zs = [low + (high - low) * i / 24 for i in range(25)]
        edge = " ".join(f"L{to_x(z):.1f} {floor - height * math.exp(-z * z / 2):.1f}" for z in zs)
        shape = f"M{to_x(low):.1f} {floor} {edge} L{to_x(high):.1f} {floor} Z"
        parts.append(f'<path class="{"ab"[number % 2]}" d="{shape}"/>')
    for z, y in ((-1.15, 160), (-0.33, 130), (0.33, 130), (1.15, 160)):
        parts.append(text(to_x(z), y, "25 %", "number"))
    parts.append(f'<path class="axis" d="M0 {floor} H{width}"/>')
    for p, z in zip((0.25, 0.5, 0.75), cuts[1:4], strict=True):
        value = f"{z:.2f}".replace("-", "−").replace("−0.00", "0")
        value = "0" if p == 0.5 else value
        parts.append(text(to_x(z), floor + 26, value, "number"))
    title = (
        "A bell curve cut into four slices of a quarter each. The cuts, the quantiles at 0.25, "
        "0.5 and 0.75, are at −0.67, 0 and 0.67 standard deviations; the outer slices are wide, "
        "the inner ones narrow."
    )
    return picture("quartiles", width, floor + 36, title, parts)


def drawings() -> dict[str, str]:
    """Return every picture under the name of its file."""
    return {
        "toolbox-floats.svg": floats(),
        "toolbox-sheets.svg": sheets(),
        "toolbox-quartiles.svg": quartiles(),
    }


def main() -> int:
    """Write the pictures into the book."""
    for name, drawing in drawings().items():
        (STATIC / name).write_text(drawing, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
