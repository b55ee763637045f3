"""Scales of blocks: how they are spread, and what error is left for the bits that are stored.

The histogram begins at zero, so that a scale's distance from it is seen; the bits stored for a
weight count its share of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from qlora_lab.errors import InputError
from qlora_lab.plots._style import (
    BACKGROUND,
    DASHES,
    INK,
    SEQUENCE,
    _figure,
    _list,
    _look,
    _not_empty,
    styled,
)


@styled
def histogram(samples: Mapping[str, Sequence[float]], quantity: str, cells: int = 60) -> Figure:
    """Draw how numbers are spread, from zero on, so that their distance from it can be seen.

    Args:
        samples: Name -> numbers of 0 or more; up to 3 samples.
        quantity: Label of the horizontal axis, with its unit.
        cells: Equal cells from 0 to the largest number.

    Returns:
        The figure; each sample in percent of its own size.

    Raises:
        InputError: There is no sample or more than 3, one is empty, or a number is negative.
    """
    if not 1 <= len(samples) <= 3:
        raise InputError(f"{len(samples)} samples: give 1 to 3")
    numbers = {name: [float(x) for x in sample] for name, sample in samples.items()}
    for name, sample in numbers.items():
        _not_empty(f"samples[{name!r}]", sample)
        if min(sample) < 0:
            raise InputError(f"samples[{name!r}] has negative numbers: this axis begins at 0")
    width = max(max(sample) for sample in numbers.values()) * 1.0001 / cells or 1.0
    figure, (ax,) = _figure(2.7)
    for i, (name, sample) in enumerate(numbers.items()):
        shares = [0.0] * cells
        for number in sample:
            shares[int(number / width)] += 100 / len(sample)
        edges = [width * cell for cell in range(cells + 1)]
        color = SEQUENCE[i]
        ax.stairs(shares, edges, fill=True, color=(*mpl.colors.to_rgb(color), 0.22))
        ax.stairs(shares, edges, color=color, linewidth=1.8, linestyle=DASHES[i], label=name)
    ax.set_xlim(0, width * cells)
    ax.set_ylim(bottom=0)
    ax.set_xlabel(quantity)
    ax.set_ylabel("share (%)")
    ax.legend(loc="upper left")
    figure.alt = f"Histogram of {quantity}, from zero on, for {_list(list(samples))}."
    return figure


@styled
def error_by_storage(
    curves: Mapping[str, Mapping[str, tuple[float, float]]],
    quantity: str = "mean absolute error (share of sigma)",
    budget: float | None = None,
) -> Figure:
    """Draw the error against the bits that are stored for a weight, scales included.

    Args:
        curves: Name -> label of a point -> (bits per weight, error). The labels are written beside
            the points of the first curve.
        quantity: Label of the vertical axis, with its unit.
        budget: Bits per weight at which a dashed line helps to compare the curves.

    Returns:
        The figure: a line a curve; further down and further left is better.

    Raises:
        InputError: There is no curve, or one without a point.
    """
    _not_empty("curves", curves)
    figure, (ax,) = _figure(3.5)
    for i, (name, points) in enumerate(curves.items()):
        _not_empty(f"curves[{name!r}]", points)
        ordered = sorted(points.items(), key=lambda item: item[1])
        ax.plot([x for _, (x, _) in ordered], [y for _, (_, y) in ordered], **_look(i), label=name)
        for label, (x, y) in ordered if i == 0 else ():
            ax.annotate(label, (x, y), (7, 4), textcoords="offset points", fontsize=9,
                        bbox={"facecolor": BACKGROUND, "linewidth": 0, "pad": 1})  # fmt: skip
    if budget is not None:
        ax.axvline(budget, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
        ax.annotate(f"{budget:g} bits", (budget, 0), (5, 6), xycoords=("data", "axes fraction"),
                    textcoords="offset points", fontsize=9)  # fmt: skip
    ax.set_xlabel("bits stored per weight, scales included")
    ax.set_ylabel(quantity)
    ax.margins(x=0.08, y=0.12)
    ax.grid()
    ax.legend(loc="upper right")
    labels = _list(list(next(iter(curves.values()))))
    figure.alt = (
        f"{quantity} against bits stored per weight for {_list(list(curves))}; points for {labels}."
    )
    return figure
