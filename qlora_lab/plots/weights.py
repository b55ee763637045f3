"""Weights on the way into four bits: the marks they round to, slices of a bell, two codes a byte.

The marks stand below the hill of the weights, each with the share that it serves, so that a mark
that nothing uses is seen. What the rounding costs is drawn as a difference with its interval.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from statistics import NormalDist

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qlora_lab.errors import InputError
from qlora_lab.plots._style import (
    BACKGROUND,
    COLORS,
    FAINT,
    GRID,
    INK,
    WIDTH,
    _figure,
    _list,
    _not_empty,
    _signed,
    _washed,
    styled,
)


@styled
def weights_and_marks(
    scaled: Sequence[float],
    codebooks: Mapping[str, Sequence[float]],
    block: Sequence[float] | None = None,
) -> Figure:
    """Draw the weights as a histogram, and below it which marks they may be rounded to.

    Args:
        scaled: Weights divided by their block's largest magnitude, between -1 and 1.
        codebooks: Name -> values in [-1, 1]; under each mark stands the share it serves.
        block: One block of `scaled`, drawn weight by weight; its largest is a diamond.

    Returns:
        The figure.

    Raises:
        InputError: There are no weights or no codebooks, or a weight is outside [-1, 1].
    """
    numbers = [float(w) for w in scaled]
    _not_empty("scaled", numbers)
    _not_empty("codebooks", codebooks)
    if max(map(abs, numbers)) > 1:
        raise InputError("a weight is outside [-1, 1]: divide each block by its largest magnitude")
    rows = len(codebooks) + (block is not None)
    figure = Figure(figsize=(WIDTH, 2.3 + 0.62 * rows), layout="constrained")
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=[2.0, 0.62 * rows])
    _weight_histogram(top, numbers, cells=81)
    low.hlines(range(rows), -1, 1, color=GRID, linewidth=1, zorder=1)
    for row, values in enumerate(codebooks.values()):
        low.vlines(values, row - 0.26, row + 0.26, color=COLORS["constants"], linewidth=2)
        for value, share in zip(values, _shares(numbers, values), strict=True):
            low.text(value, row + 0.32, f"{100 * share:.0f}", fontsize=8.5, ha="center", va="top")
    if block is not None:
        _one_block(low, rows - 1, [float(w) for w in block])
    labels = [f"{name}, marks\n(% of weights)" for name in codebooks]
    low.set_yticks(range(rows), labels + ["one block"] * (block is not None))
    low.set_ylim(rows - 0.35, -0.5)
    low.set_xlabel("weight, divided by the largest magnitude of its block")
    low.tick_params(axis="y", length=0)
    low.spines["left"].set_visible(False)
    one = " Below them one block, weight by weight; its largest lies on an end."
    figure.alt = (
        "Histogram of weights scaled to -1..1: a hill around 0 with a narrow spike at either end. "
        f"Below it the marks of {_list(list(codebooks))}, each with the percentage of the weights "
        f"that are rounded to it.{one if block is not None else ''}"
    )
    return figure


def _weight_histogram(ax: Axes, numbers: Sequence[float], cells: int) -> None:
    """Share of the weights in equal cells; the outermost two are centred on -1 and 1."""
    counts = [0] * cells
    for number in numbers:
        counts[round((number + 1) / 2 * (cells - 1))] += 1
    where = [2 * i / (cells - 1) - 1 for i in range(cells)]
    heights = [100 * count / len(numbers) for count in counts]
    ax.bar(where, heights, 2 / (cells - 1), color=_washed(COLORS["weights"], 0.6), linewidth=0)
    ax.step(where, heights, where="mid", color=COLORS["weights"], linewidth=1.2)
    ax.set_ylabel("weights (%)")
    ax.set_ylim(bottom=0)


def _shares(numbers: Sequence[float], values: Sequence[float]) -> list[float]:
    """Share of the numbers that are nearest to each value."""
    borders = [(low + high) / 2 for low, high in zip(values, values[1:], strict=False)]
    counts = [0] * len(values)
    for number in numbers:
        counts[bisect_left(borders, number)] += 1
    return [count / len(numbers) for count in counts]


def _one_block(ax: Axes, row: int, block: Sequence[float]) -> None:
    """A block's weights as dots, spread a little so that none hides another."""
    largest = max(range(len(block)), key=lambda i: abs(block[i]))
    rest = [i for i in range(len(block)) if i != largest]
    heights = [row + 0.09 * ((3 * i) % 7 - 3) / 1.5 for i in rest]
    color = COLORS["weights"]
    ax.plot([block[i] for i in rest], heights, "o", color=color, markersize=3.5)
    ax.plot(block[largest], row, "D", color=COLORS["gradients"], markersize=9,
            markeredgecolor=INK, clip_on=False, zorder=4)  # fmt: skip


@styled
def bell_slices(panels: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Draw bell curves cut into slices, with the marks that the slices give.

    Args:
        panels: Title -> (borders of the slices, marks), in standard deviations and ascending;
            infinite ones are drawn as arrows. Up to 3 panels.

    Returns:
        The figure.

    Raises:
        InputError: There is no panel, or more than 3.
    """
    if not 1 <= len(panels) <= 3:
        raise InputError(f"{len(panels)} panels: give 1 to 3")
    figure, axes = _figure(2.7, columns=len(panels), sharey=True)
    for ax, (title, (borders, marks)) in zip(axes, panels.items(), strict=True):
        _bell(ax, borders, marks)
        ax.set_title(title, fontsize=9.5)
        ax.set_xlabel("standard deviations", fontsize=9)
    axes[0].set_ylabel("density")
    counts = [f"{title} ({len(marks)} marks)" for title, (_, marks) in panels.items()]
    figure.alt = (
        f"Bell curves cut into slices, with a mark for each: {_list(counts)}. The slices are "
        "narrow where the curve is high and wide at its ends; an arrow stands for infinity."
    )
    return figure


def _bell(ax: Axes, borders: Sequence[float], marks: Sequence[float], reach: float = 3.1) -> None:
    density = NormalDist().pdf

    def span(left: float, right: float) -> list[float]:
        return [left + (right - left) * step / 60 for step in range(61)]

    for i, (left, right) in enumerate(zip(borders, borders[1:], strict=False)):
        xs = span(max(left, -reach), min(right, reach))
        color = _washed(COLORS["weights"], 0.62 if i % 2 else 0.86)
        ax.fill_between(xs, [density(x) for x in xs], color=color, linewidth=0)
    xs = span(-reach, reach)
    ax.plot(xs, [density(x) for x in xs], color=COLORS["weights"], linewidth=1.4)
    mark = COLORS["constants"]
    finite = [m for m in marks if math.isfinite(m)]
    ax.vlines(finite, -0.055, -0.01, color=mark, linewidth=2)
    zeros = [m for m in finite if m == 0]
    ax.plot(zeros, [-0.033] * len(zeros), "o", color=mark, markersize=6, zorder=3)
    for side in {math.copysign(1, m) for m in marks if not math.isfinite(m)}:
        ax.annotate("", (side * reach, -0.033), (side * (reach - 0.9), -0.033),
                    arrowprops={"arrowstyle": "-|>", "color": mark, "linewidth": 1.8})  # fmt: skip
        sign = "\N{MINUS SIGN}" if side < 0 else "+"
        ax.text(side * (reach - 0.45), -0.06, f"{sign}\N{INFINITY}", ha="center", va="top")
    ax.set_xlim(-reach - 0.1, reach + 0.1)
    ax.set_ylim(-0.115, 0.42)
    ax.set_yticks([0, 0.2, 0.4])


@styled
def half_bytes(weights: Sequence[float], codes: Sequence[int]) -> Figure:
    """Draw how weights become codes, and two codes a byte.

    Args:
        weights: An even number of weights, at most 8 of one block.
        codes: The code of each, 0 to 15.

    Returns:
        The figure: a column a weight, three rows: weight, code, byte.

    Raises:
        InputError: The numbers of weights and codes differ, are odd, or above 8; or a code has
            more than 4 bits.
    """
    n = len(weights)
    if n != len(codes) or n % 2 or not 2 <= n <= 8:
        raise InputError(f"{n} weights and {len(codes)} codes: give 2, 4, 6 or 8 of each")
    if not all(0 <= code <= 15 for code in codes):
        raise InputError(f"codes {list(codes)}: half a byte holds 0 to 15")
    figure, (ax,) = _figure(2.8)
    shades = [_washed(COLORS["weights"], 0.72), _washed(COLORS["gradients"], 0.6)]
    for i, (weight, code) in enumerate(zip(weights, codes, strict=True)):
        _box(ax, i, 2, 1, shades[i % 2], _signed(weight))
        _box(ax, i, 1, 1, shades[i % 2], f"{code}\n{code:04b}")
        for row in (2, 1):
            ax.annotate("", (i + 0.5, row - 0.37), (i + 0.5, row - 0.01),
                        arrowprops={"arrowstyle": "-|>", "color": FAINT})  # fmt: skip
    for i in range(0, n, 2):
        high, low = codes[i], codes[i + 1]
        _box(ax, i, 0, 1, shades[0], f"{high:04b}", right=0)
        _box(ax, i + 1, 0, 1, shades[1], f"{low:04b}", left=0)
        ax.text(i + 1, -0.08, f"byte {16 * high + low}", ha="center", va="top")
    ax.set_yticks([2.31, 1.31, 0.31], ["weight", "code\n(4 bits)", "byte\n(8 bits)"])
    ax.set_xticks([])
    ax.set_xlim(0, n)
    ax.set_ylim(-0.42, 2.7)
    ax.set_xlabel(f"{n} neighbouring weights of one block, {n // 2} bytes")
    ax.tick_params(axis="y", length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    packed = [16 * codes[i] + codes[i + 1] for i in range(0, n, 2)]
    figure.alt = (
        f"{n} weights in a row; below each its 4-bit code ({_list(codes)}); below each pair of "
        f"codes the byte that holds both, the first code in the high half ({_list(packed)})."
    )
    return figure


def _box(
    ax: Axes, x: float, y: float, width: float, color, text: str, left=0.06, right=0.06
) -> None:
    """A labelled box; a gap of 0 lets it touch its neighbour."""
    place = (x + left, y), width - left - right, 0.62
    ax.add_patch(Rectangle(*place, facecolor=color, edgecolor=FAINT, linewidth=0.8))
    ax.text(x + (width + left - right) / 2, y + 0.3, text, ha="center", va="center", fontsize=9.5)


@styled
def differences(
    rows: Mapping[str, tuple[float, float, float]], quantity: str, zero: str = "no difference"
) -> Figure:
    """Draw differences with their intervals, beside the line where there is none.

    Args:
        rows: Name -> (difference, low end, high end).
        quantity: Label of the horizontal axis, with its unit.
        zero: What the line at 0 means.

    Returns:
        The figure, a row a name; a filled mark where the interval leaves 0 out.

    Raises:
        InputError: There is no row.
    """
    _not_empty("rows", rows)
    figure, (ax,) = _figure(1.1 + 0.42 * len(rows))
    for row, (middle, low, high) in enumerate(rows.values()):
        sure = low > 0 or high < 0
        color = COLORS["weights"]
        ax.errorbar(middle, row, xerr=[[middle - low], [high - middle]], color=color, marker="o",
                    markersize=8, markerfacecolor=color if sure else BACKGROUND, capsize=4,
                    elinewidth=1.8, markeredgewidth=1.8)  # fmt: skip
    ax.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
    ax.text(0, -0.62, zero, fontsize=9, ha="center", va="bottom")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.5, -0.6)
    ax.set_xlabel(quantity)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    figure.alt = (
        f"{quantity} for {_list(list(rows))}, each with an interval, beside a line that says "
        f"{zero}. A filled mark: the interval leaves out 0."
    )
    return figure
