"""Sweeps over seeds: the middle seed over the range of all, and a dot for each.

Nothing is averaged and no seed is left out: the range shows what one run can come out as.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from qlora_lab.plots._style import (
    COLORS,
    INK,
    _figure,
    _list,
    _look,
    _not_empty,
    _quantile,
    _washed,
    styled,
)


@styled
def bands(
    lines: Mapping[str, Mapping[float, Sequence[float]]],
    horizontal: str,
    vertical: str,
    *,
    log: str = "x",
    point: tuple[float, float, str] | None = None,
    level: tuple[float, str] | None = None,
    legend: str | tuple[float, float] = "best",
) -> Figure:
    """Draw what was measured over seeds against a setting: the middle seed over the range of all.

    Args:
        lines: Name -> setting -> one value a seed.
        horizontal: Label of the horizontal axis, with its unit.
        vertical: Label of the vertical axis, with its unit.
        log: "x", "y" or "xy" for logarithmic axes.
        point: A further measurement (setting, value, name), drawn as a star.
        level: A value and what it means, drawn as a thin dashed line across.
        legend: Where the names stand, as matplotlib calls it, or the place of their lower left
            corner as shares of the axes.

    Returns:
        The figure. The settings of all lines are marked on the axis.

    Raises:
        InputError: There is no line, one is empty, or a setting has no value.
    """
    _not_empty("lines", lines)
    figure, (ax,) = _figure(3.2)
    for i, (name, values) in enumerate(lines.items()):
        _not_empty(f"lines[{name!r}]", values)
        for setting, seeds in values.items():
            _not_empty(f"lines[{name!r}][{setting!r}]", seeds)
        settings = sorted(values)
        ordered = [sorted(float(v) for v in values[x]) for x in settings]
        look = _look(i)
        ax.fill_between(settings, [v[0] for v in ordered], [v[-1] for v in ordered],
                        color=_washed(look["color"], 0.72), linewidth=0)  # fmt: skip
        ax.plot(settings, [_quantile(v, 0.5) for v in ordered], **look, label=name)
    if point is not None:
        x, y, name = point
        ax.plot([x], [y], marker="*", markersize=17, color=COLORS["gradients"], linestyle="",
                markeredgecolor=INK, label=name, zorder=5)  # fmt: skip
    if level is not None:
        value, meaning = level
        ax.axhline(value, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
        ax.annotate(meaning, (1, value), (-4, 4), xycoords=("axes fraction", "data"),
                    textcoords="offset points", fontsize=9, ha="right")  # fmt: skip
    for axis in log:
        getattr(ax, f"set_{axis}scale")("log")
    if "y" in log:  # 20, 50, 100 in place of powers of ten
        ax.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    marked = sorted({x for values in lines.values() for x in values})
    ax.set_xticks(marked, [f"{x:g}" for x in marked])
    ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    ax.set_xlabel(horizontal)
    ax.set_ylabel(vertical)
    ax.margins(x=0.04)
    ax.grid(axis="y")
    ax.legend(loc=legend)
    star = f" A star: {point[2]}." if point else ""
    star += f" A dashed line: {level[1]}." if level else ""
    figure.alt = (
        f"{vertical} against {horizontal} for {_list(list(lines))}; lines are the middle of "
        f"several seeds, shaded areas reach from the lowest to the highest.{star}"
    )
    return figure


@styled
def seed_dots(rows: Mapping[str, Sequence[float]], quantity: str) -> Figure:
    """Draw one dot a seed for each of a few ways, and a bar at their middle.

    Args:
        rows: Name -> one value a seed.
        quantity: Label of the horizontal axis, with its unit.

    Returns:
        The figure, a row a name.

    Raises:
        InputError: There is no row, or one has no value.
    """
    _not_empty("rows", rows)
    figure, (ax,) = _figure(0.9 + 0.42 * len(rows))
    for row, (name, seeds) in enumerate(rows.items()):
        _not_empty(f"rows[{name!r}]", seeds)
        color = COLORS["weights"]
        middle = _quantile(sorted(float(v) for v in seeds), 0.5)
        ax.plot([middle] * 2, [row - 0.28, row + 0.28], color=color, linewidth=2.4)
        ax.plot(seeds, [row] * len(seeds), linestyle="", marker="o", markersize=8, color=color,
                markerfacecolor=_washed(color, 0.45))  # fmt: skip
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(quantity)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.05)
    ax.grid(axis="x")
    figure.alt = f"{quantity}: one dot a seed and a bar at their middle, for {_list(list(rows))}."
    return figure
