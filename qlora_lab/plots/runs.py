"""What training does: the loss step by step, and the scores on graded tests before and after.

Where there are recorded runs, a loss is drawn over their band, and a score with its interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from qlora_lab.errors import InputError
from qlora_lab.plots._style import (
    BACKGROUND,
    COLORS,
    INK,
    SEQUENCE,
    _figure,
    _list,
    _look,
    _not_empty,
    _washed,
    styled,
)


@styled
def loss_curve(
    losses: Mapping[str, Sequence[float]],
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    smooth: int = 1,
    every: int = 1,
    quantity: str = "training loss (nats per token)",
) -> Figure:
    """Draw training losses step by step, each over its recorded band if there is one.

    Args:
        losses: Name -> losses in the order of the steps.
        bands: Name -> (low, high) of recorded runs, drawn as an area.
        smooth: Steps averaged for the line, half of them on each side; the single steps are drawn
            faintly behind it.
        every: Optimizer steps from one loss to the next.
        quantity: Label of the vertical axis, with its unit.

    Returns:
        The figure.

    Raises:
        InputError: There is no loss, or a number is not positive.
    """
    _not_empty("losses", losses)
    if smooth < 1 or every < 1:
        raise InputError(f"smooth {smooth} and every {every}: give whole numbers from 1 on")
    figure, (ax,) = _figure(3.3)
    names = list(dict.fromkeys((*losses, *(bands or {}))))
    for i, name in enumerate(names):
        color = SEQUENCE[i % len(SEQUENCE)]
        if bands and name in bands:
            low, high = bands[name]
            steps = [every * (s + 1) for s in range(len(low))]
            label = "recorded runs" if name == next(iter(bands)) else None
            washed = _washed(color, 0.65)
            ax.fill_between(steps, low, high, color=washed, linewidth=0, label=label)
        if name not in losses:
            continue
        values = [float(v) for v in losses[name]]
        _not_empty(f"losses[{name!r}]", values)
        steps = [every * (s + 1) for s in range(len(values))]
        if smooth > 1:
            ax.plot(steps, values, color=_washed(color, 0.6), linewidth=0.8)
            half = smooth // 2
            values = [fmean(values[max(0, s - half) : s + half + 1]) for s in range(len(values))]
        gap = max(1, len(values) // 8)
        ax.plot(steps, values, **_look(i), markevery=(gap * i // len(names), gap), label=name)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(quantity)
    ax.set_ylim(bottom=0)
    ax.margins(x=0.02)
    ax.grid(axis="y")
    ax.legend(loc="upper right")
    band = " Shaded areas are the range of recorded runs." if bands else ""
    figure.alt = f"{quantity} against the optimizer step for {_list(names)}.{band}"
    return figure


@styled
def grade_table_bars(
    before: Mapping[str, float],
    after: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]] | None = None,
    quantity: str = "exact match (% of the test set)",
) -> Figure:
    """Draw the score on each graded test set before and after training.

    Args:
        before: Grade -> percent, 0 to 100.
        after: The same grades after training.
        intervals: Grade -> (low, high) percent around `after`.
        quantity: Label of the horizontal axis, with its unit.

    Returns:
        The figure; a pair of bars a grade, in the order of `before`.

    Raises:
        InputError: The grades differ, or a score is not a percentage.
    """
    _not_empty("before", before)
    if set(before) != set(after):
        raise InputError(f"grades differ before and after: {sorted(set(before) ^ set(after))}")
    for grade, score in (*before.items(), *after.items()):
        if not 0 <= score <= 100:
            raise InputError(f"score {score} of {grade!r} is no percentage: give 0 to 100")
    figure, (ax,) = _figure(0.9 + 0.55 * len(before))
    for row, grade in enumerate(before):
        pairs = ((before[grade], -0.2, "gradients", "...."), (after[grade], 0.19, "weights", ""))
        for score, offset, color, hatch in pairs:
            ax.barh(row + offset, score, 0.36, color=COLORS[color], hatch=hatch,
                    edgecolor=BACKGROUND, linewidth=0)  # fmt: skip
            low, high = (intervals or {}).get(grade, (score, score)) if offset > 0 else (score,) * 2
            for color, width in ((BACKGROUND, 3.5), (INK, 1.2)) if high > low else ():
                ax.errorbar(score, row + offset, xerr=[[score - low], [high - score]], color=color,
                            capsize=3, capthick=width, elinewidth=width)  # fmt: skip
            ax.text(max(score, high) + 1.2, row + offset, f"{score:.0f} %", va="center", fontsize=9)
    ax.set_yticks(range(len(before)), before)
    ax.set_ylim(len(before) - 0.45, -0.6)
    ax.set_xlim(0, 100)
    ax.set_xlabel(quantity)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    handles = [
        Patch(facecolor=COLORS["gradients"], hatch="....", edgecolor=BACKGROUND, label="before"),
        Patch(facecolor=COLORS["weights"], label="after training"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    figure.alt = f"{quantity} before and after training, for {_list(list(before))}."
    return figure
