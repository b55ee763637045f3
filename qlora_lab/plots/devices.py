"""Two devices: what each of them holds, and what it sends, one column a way of sharing the work."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from qlora_lab.errors import InputError
from qlora_lab.plots._style import (
    SLICES,
    _figure,
    _not_empty,
    _slice_style,
    styled,
)


@styled
def shared_columns(panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Draw what each device of a run holds and sends, one column a way of sharing the work.

    Args:
        panels: Title of a panel -> name of a column -> slice -> bytes; slices as in `SLICES`.

    Returns:
        The figure: a panel a quantity, on one scale, the total above each column.

    Raises:
        InputError: There is no panel, or a slice is unknown.
    """
    _not_empty("panels", panels)
    stacks = [stack for columns in panels.values() for stack in columns.values()]
    unknown = {name for stack in stacks for name in stack} - set(SLICES)
    if unknown:
        raise InputError(f"slices {sorted(unknown)} are unknown: give some of {', '.join(SLICES)}")
    longest = max(sum(stack.values()) for stack in stacks)
    scale, unit = (1e9, "GB") if longest > 1e9 else (1e6, "MB")
    figure, axes = _figure(3.8, columns=len(panels), sharey=True)
    totals = []
    for ax, (title, columns) in zip(axes, panels.items(), strict=True):
        for place, (name, stack) in enumerate(columns.items()):
            bottom = 0.0
            for part in SLICES:
                height = stack.get(part, 0) / scale
                ax.bar(place, height, bottom=bottom, width=0.55, **_slice_style(part, None))
                bottom += height
            ax.text(place, bottom, f"{bottom:.3g} {unit}", ha="center", va="bottom", fontsize=9.5)
            totals.append(f"{title}, {name}: {bottom:.3g} {unit}")
        ax.set_xticks(range(len(columns)), columns)
        ax.set_xlim(-0.6, len(columns) - 0.4)
        ax.set_ylim(0, 1.1 * longest / scale)
        ax.set_title(title)
        ax.tick_params(axis="x", length=0)
        ax.grid(axis="y")
    axes[0].set_ylabel(f"{unit} (1 {unit} = {scale:,.0f} bytes)")
    used = [part for part in SLICES if any(stack.get(part) for stack in stacks)]
    handles = [Patch(label=SLICES[part], **_slice_style(part, None)) for part in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1.4)
    figure.alt = f"Stacked columns of bytes. {'; '.join(totals)}."
    return figure
