"""Formats and codes: which values a format has, how often each is used, and what error that leaves.

An error is drawn with its interval where there is one. Whether a sample is a bell curve is seen in
its quantiles; a histogram would hide the tails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean, pstdev

import matplotlib as mpl
from matplotlib.figure import Figure

from qlora_lab.errors import InputError
from qlora_lab.plots._style import (
    BACKGROUND,
    FAINT,
    GRID,
    INK,
    SEQUENCE,
    _figure,
    _list,
    _look,
    _not_empty,
    _quantile,
    _signed,
    styled,
)


@styled
def codebook_ruler(codebooks: Mapping[str, Sequence[float]]) -> Figure:
    """Draw several formats as marks on one ruler, each scaled to its largest magnitude.

    Args:
        codebooks: Name -> the values it can store, in any order and scale.

    Returns:
        The figure; one line a format, its number of different values at the right.

    Raises:
        InputError: There is no codebook, or one without a value other than 0.
    """
    _not_empty("codebooks", codebooks)
    figure, (ax,) = _figure(0.9 + 0.52 * len(codebooks))
    for row, (name, values) in enumerate(codebooks.items()):
        largest = max((abs(v) for v in values), default=0)
        if not largest:
            raise InputError(f"codebook {name!r} has no value but 0: give the values it can store")
        marks = sorted({v / largest for v in values})
        color = SEQUENCE[row % len(SEQUENCE)]
        ax.plot([-1, 1], [row, row], color=GRID, linewidth=1, zorder=1)
        thin = len(marks) > 64
        ax.vlines(marks, row - 0.3, row + 0.3, color=color, linewidth=0.7 if thin else 2, zorder=2)
        if not thin:
            zeros = [m for m in marks if m == 0]
            ax.plot(zeros, [row] * len(zeros), "o", color=color, markersize=5, zorder=3)
        ax.text(1.04, row, f"{len(marks)} values", va="center", color=FAINT, fontsize=9)
    ax.set_yticks(range(len(codebooks)), codebooks)
    ax.set_ylim(len(codebooks) - 0.4, -0.6)
    ax.set_xlim(-1.04, 1.25)
    ax.set_xticks([-1, -0.5, 0, 0.5, 1])
    ax.set_xlabel("stored value (as a share of the block's largest magnitude)")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.spines["bottom"].set_bounds(-1, 1)
    counts = [f"{name} with {len({float(v) for v in c})} values" for name, c in codebooks.items()]
    figure.alt = (
        f"The values that {_list(counts)} can store, as marks on one ruler from -1 to 1. "
        "A dot marks an exact zero."
    )
    return figure


@styled
def code_histogram(
    counts: Sequence[float] | Mapping[str, Sequence[float]], values: Sequence[float] | None = None
) -> Figure:
    """Draw how often each code is used, against equal use.

    Args:
        counts: Number of times each code occurs, or several of these by name (up to 3).
        values: What each code stands for, to be written under it.

    Returns:
        The figure; bars in percent of all codes.

    Raises:
        InputError: There is nothing to count, or the lengths differ.
    """
    series = dict(counts) if isinstance(counts, Mapping) else {"": counts}
    _not_empty("counts", series)
    lengths = {len(c) for c in series.values()} | ({len(values)} if values is not None else set())
    if len(lengths) != 1 or len(series) > 3 or not all(sum(c) > 0 for c in series.values()):
        raise InputError(
            f"counts of {sorted(lengths)} codes in {len(series)} series cannot be drawn: give up "
            "to 3 series of the same length, each with at least one code used"
        )
    (n,) = lengths
    figure, (ax,) = _figure(3.1)
    width = 0.8 / len(series)
    for i, (name, each) in enumerate(series.items()):
        share = [100 * float(c) / float(sum(each)) for c in each]
        where = [x + (i - (len(series) - 1) / 2) * width for x in range(n)]
        hatch = ("", "////", "....")[i]
        ax.bar(where, share, width * 0.94, color=SEQUENCE[i], hatch=hatch, edgecolor=BACKGROUND,
               linewidth=0.4, label=name or None)  # fmt: skip
    ax.axhline(100 / n, color=BACKGROUND, linewidth=1.8)  # so that the dashes show on dark bars
    ax.axhline(100 / n, color=INK, linewidth=1, linestyle=(0, (4, 2)), label="equal use")
    ticks = range(n) if n <= 32 else range(0, n, n // 16)
    labels = [str(i) if values is None else f"{i}\n{_signed(values[i])}" for i in ticks]
    ax.set_xticks(list(ticks), labels, fontsize=8.5 if values is not None else 9.5)
    ax.set_xlabel("code" if values is None else "code, and the value it stands for")
    ax.set_ylabel("share of all codes (%)")
    ax.set_xlim(-0.6, n - 0.4)
    ax.set_ylim(0, ax.get_ylim()[1] * (1 + 0.06 * (len(series) + 1)))  # room for the legend
    ax.legend(loc="upper left", ncols=len(series) + 1, handlelength=2.4)
    names = f" for {_list(list(series))}" if series.keys() != {""} else ""
    figure.alt = (
        f"Histogram of the {n} codes{names}: the share of all codes that each one has, with a "
        "dashed line where all would be used equally."
    )
    return figure


@styled
def error_bars_by_bits(
    errors: Mapping[str, Mapping[int, float | tuple[float, float, float]]],
    quantity: str = "mean absolute error (share of sigma)",
    legend: bool = True,
    log: bool = True,
) -> Figure:
    """Draw the error of several formats against their number of bits, with intervals.

    Args:
        errors: Format -> bits -> error, or (error, low, high) with the ends of an interval.
        quantity: Label of the vertical axis, with its unit.
        legend: False hides which format is which, for a guess.
        log: Logarithmic vertical axis.

    Returns:
        The figure.

    Raises:
        InputError: There is no format, or one without any error.
    """
    _not_empty("errors", errors)
    figure, (ax,) = _figure(3.3)
    bits = sorted({b for each in errors.values() for b in each})
    for i, (name, each) in enumerate(errors.items()):
        _not_empty(f"errors[{name!r}]", each)
        # beside each other, or equal errors would hide one another
        where = [b + (i - (len(errors) - 1) / 2) * 0.09 for b in sorted(each)]
        triples = [_triple(each[b]) for b in sorted(each)]
        middle = [t[0] for t in triples]
        around = [[t[0] - t[1] for t in triples], [t[2] - t[0] for t in triples]]
        ax.errorbar(where, middle, around, **_look(i), markersize=7, linewidth=1.4, capsize=4,
                    elinewidth=1.6, label=name)  # fmt: skip
    ax.set_xticks(bits)
    ax.set_xlim(min(bits) - 0.4, max(bits) + 0.4)
    ax.set_xlabel("bits per code")
    ax.set_ylabel(quantity)
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    ax.grid(axis="y")
    if legend:
        ax.legend(loc="upper right")
    names = _list(list(errors)) if legend else f"{len(errors)} formats without their names"
    figure.alt = (
        f"{quantity} against bits per code ({_list(bits)} bits) for {names}, with intervals."
    )
    return figure


@styled
def qq_plot(samples: Mapping[str, Sequence[float]], points: int = 101) -> Figure:
    """Draw the quantiles of samples against those of a normal distribution.

    Each sample is standardised first (mean 0, standard deviation 1), so a bell curve of any size
    lies on the diagonal; a tail heavier than a bell curve's leaves it upwards at the right.

    Args:
        samples: Name -> numbers, at least 10 of them and not all equal.
        points: Quantiles drawn for each sample.

    Returns:
        The figure.

    Raises:
        InputError: A sample is too small or constant.
    """
    _not_empty("samples", samples)
    figure, (ax,) = _figure(4.2)
    probabilities = [(i + 0.5) / points for i in range(points)]
    normal = [NormalDist().inv_cdf(p) for p in probabilities]
    edge = max(normal)
    gap = max(1, points // 10)  # quantiles from one marker to the next
    ax.plot([-edge, edge], [-edge, edge], color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=4)
    for i, (name, sample) in enumerate(samples.items()):
        numbers = sorted(float(x) for x in sample)
        if len(numbers) < 10 or not (spread := pstdev(numbers)) > 0:
            raise InputError(
                f"sample {name!r} has no distribution: give 10 different numbers or more"
            )
        center = fmean(numbers)
        drawn = [(_quantile(numbers, p) - center) / spread for p in probabilities]
        ax.plot(normal, drawn, **_look(i), linewidth=1.6, markersize=5,
                markevery=(3 * gap * i // 10 % gap, gap), label=name)  # fmt: skip
    ax.set_xlabel("quantile of a normal distribution (standard deviations)")
    ax.set_ylabel("quantile of the sample\n(its standard deviations)")
    ax.set_box_aspect(0.62)
    ax.grid()
    ax.legend(loc="upper left")
    figure.alt = (
        f"Quantiles of {_list(list(samples))} against normal quantiles; a dashed diagonal shows "
        "where a bell curve would lie."
    )
    return figure


def _triple(error: float | tuple[float, float, float]) -> tuple[float, float, float]:
    return error if isinstance(error, tuple) else (error, error, error)
