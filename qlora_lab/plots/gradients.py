"""Gradients: cards that say what each one reads, and plain curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qlora_lab.errors import InputError
from qlora_lab.plots._style import (
    BACKGROUND,
    COLORS,
    DASHES,
    FAINT,
    INK,
    SLICES,
    _figure,
    _list,
    _look,
    _not_empty,
    styled,
)


@styled
def gradient_cards(
    cards: Mapping[str, tuple[str, Sequence[str], str]],
    parts: Mapping[str, str],
    question: str | None = None,
) -> Figure:
    """Draw one card a gradient: its formula, and which tensors the formula reads.

    Args:
        cards: Title -> (formula for mathtext, parts that it reads, what becomes of it).
        parts: Part in mathtext -> slice of `SLICES` whose colour it has, in the order of drawing.
        question: A part to frame in every card, because the picture is about it.

    Returns:
        The figure; a part that is read has a filled square.

    Raises:
        InputError: There is no card, a card reads a part that is not drawn, or a slice is unknown.
    """
    _not_empty("cards", cards)
    unknown = {part for _, reads, _ in cards.values() for part in reads} - set(parts)
    if unknown or set(parts.values()) - set(SLICES) or question not in (None, *parts):
        raise InputError(f"give parts of {_list(list(parts))}, each with one of {_list([*SLICES])}")
    figure, axes = _figure(2.9, columns=len(cards))
    for ax, (title, (formula, reads, use)) in zip(axes, cards.items(), strict=True):
        ax.set_title(title, loc="center")
        ax.text(0.5, 0.9, formula, ha="center", va="center", fontsize=11)
        for row, (part, slice_) in enumerate(parts.items()):
            y, read = 0.72 - 0.14 * row, part in reads
            face = COLORS[slice_] if read else BACKGROUND
            ax.add_patch(
                Rectangle((0.3, y - 0.045), 0.13, 0.09, facecolor=face, edgecolor=FAINT, lw=0.9)
            )
            ax.text(0.52, y, part, va="center", fontsize=11, color=INK if read else FAINT)
            if part == question:
                ax.add_patch(Rectangle((0.22, y - 0.07), 0.56, 0.14, fill=False, edgecolor=INK,
                                       linewidth=1.2, linestyle=DASHES[1]))  # fmt: skip
        ax.text(0.5, 0.0, use, ha="center", va="center", fontsize=9)
        ax.add_patch(Rectangle((0, -0.08), 1, 1.08, fill=False, edgecolor=FAINT, linewidth=0.9))
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylim(-0.1, 1.02)
        ax.axis("off")
    plain = {part: part.strip("$").replace(r"\hat", "").strip() for part in parts}
    read = "; ".join(
        f"{title} reads {_list([plain[part] for part in parts if part in reads])}"
        for title, (_, reads, _) in cards.items()
    )
    figure.alt = f"A card for each gradient: {read}."
    return figure


@styled
def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    horizontal: str,
    vertical: str,
    *,
    log: str = "",
    level: tuple[float, str] | None = None,
    markers: bool = False,
    legend: str = "best",
) -> Figure:
    """Draw a few lines over one pair of axes.

    Args:
        lines: Name -> (positions, values).
        horizontal: Label of the horizontal axis, with its unit.
        vertical: Label of the vertical axis, with its unit.
        log: "x", "y" or "xy" for logarithmic axes.
        level: A value and what it means, drawn as a thin dashed line across.
        markers: Mark every point, for lines of few points.
        legend: Where the names stand, as matplotlib calls it; or "above" the axes.

    Returns:
        The figure.

    Raises:
        InputError: There is no line, one is empty, or its two sequences differ in length.
    """
    _not_empty("lines", lines)
    figure, (ax,) = _figure(3.2)
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        _not_empty(f"lines[{name!r}]", xs)
        if len(xs) != len(ys):
            raise InputError(f"lines[{name!r}] has {len(xs)} positions and {len(ys)} values")
        ax.plot(xs, ys, label=name, **_look(i) | ({} if markers else {"marker": ""}))
    if level is not None:
        value, meaning = level
        ax.axhline(value, color=INK, linewidth=1.3, linestyle=(0, (2, 2)), zorder=1, label=meaning)
    for axis in log:
        getattr(ax, f"set_{axis}scale")("log")
    ax.set_xlabel(horizontal)
    ax.set_ylabel(vertical)
    ax.margins(x=0.02)
    ax.grid(axis="y")
    if legend == "above":
        figure.legend(loc="outside upper center", ncols=3)
    else:
        ax.legend(loc=legend)
    across = f" A dashed line: {level[1]}." if level else ""
    figure.alt = f"{vertical} against {horizontal} for {_list(list(lines))}.{across}"
    return figure
