"""Stacked bytes: the spine, which is the course's standing picture, and the bars of several runs.

Both take their numbers from the ledger, `qlora_lab.memory`: a bar is as long as its rows say. One
slice of memory has one colour, one hatch and one place in the order, in all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from qlora_lab.errors import InputError, shown
from qlora_lab.plots._style import (
    BACKGROUND,
    DASHES,
    FAINT,
    INK,
    SLICES,
    _figure,
    _list,
    _not_empty,
    _slice_style,
    styled,
)

if TYPE_CHECKING:
    from qlora_lab.memory import Ledger

# The spine


PAGED = {"hatch": "xxxx", "edgecolor": BACKGROUND}
"""How the part of the optimizer state that may be paged to the CPU is drawn."""

_LIT_BY_STEP = {
    "full fine-tuning": "gradients",
    "LoRA": "adapters",
    "4 bits": "weights",
    "double quantization": "constants",
    "paging": "optimizer",
}
STEPS = tuple(_LIT_BY_STEP)


@styled
def spine(stage: str | None = None, activations: bool = False) -> Figure:
    """Draw the bytes of a run from full fine-tuning to paging, for two models.

    The course's standing picture: five bars for the embedded model and five for a 7B model, each
    the ledger's rows of that run (16-bit weights, r=16 on all linear layers, 32-bit adapters).
    Without activations and logits the bars say what is held before the first batch.

    Args:
        stage: The slice to light: a name from `SLICES`, or the step from `STEPS` that changes
            it. None lights all.
        activations: Add activations and logits, for one sequence of 512 tokens with
            checkpointing (`stage="activations"` implies it).

    Returns:
        The figure.

    Raises:
        InputError: `stage` is neither a slice nor a step.
    """
    lit = _LIT_BY_STEP.get(stage, stage)
    if lit is not None and lit not in SLICES:
        names = ", ".join((*SLICES, *STEPS))
        raise InputError(f"stage {shown(stage)} is not in the picture: give one of {names}")
    activations = activations or lit == "activations"

    figure, axes = _figure(3.3, columns=2, sharey=True)
    slices = [s for s in SLICES if activations or s != "activations"]
    models = _spine_ledgers(activations)
    for ax, (title, ledgers) in zip(axes, models.items(), strict=True):
        _spine_panel(ax, title, ledgers, slices, lit)
    axes[0].set_yticks(range(len(STEPS)), STEPS)
    axes[0].invert_yaxis()
    for label in axes[0].get_yticklabels():
        label.set_fontweight("bold" if lit and _LIT_BY_STEP[label.get_text()] == lit else "normal")

    handles = [Patch(label=SLICES[s], **_slice_style(s, lit)) for s in slices]
    if lit == "optimizer":
        style = _slice_style("optimizer", lit) | PAGED
        handles.append(Patch(label="optimizer state that may be paged", **style))
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1.4)
    for text in legend.get_texts():
        text.set_fontweight("bold" if lit and text.get_text() == SLICES[lit] else "normal")
    figure.alt = _spine_alt(models, lit)
    return figure


def _spine_panel(
    ax: Axes, title: str, ledgers: list[dict[str, float]], slices: list[str], lit: str | None
) -> None:
    """One model: five stacked bars; the first is cut, or the others could not be read."""
    totals = [sum(book[s] for s in slices) for book in ledgers]
    cut, limit = totals[1] * 1.12, totals[1] * 1.72
    unit, scale = ("GB", 1e9) if totals[1] > 1e9 else ("MB", 1e6)
    for row, (book, total) in enumerate(zip(ledgers, totals, strict=True)):
        left = 0.0
        for name in slices:
            width = min(book[name], max(0.0, cut - left))
            if not width:
                continue
            paged = min(book["pageable"], width) if name == "optimizer" else 0
            style = _slice_style(name, lit)
            ax.barh(row, width - paged, left=left, height=0.66, **style)
            if paged:
                ax.barh(row, paged, left=left + width - paged, height=0.66, **style | PAGED)
            left += width
        ax.barh(row, min(total, cut), height=0.66, fill=False, edgecolor=FAINT, linewidth=0.7)
        if total > cut:  # a slanted gap: this bar goes on
            at = cut * 0.93
            ax.plot([at - limit * 0.012, at + limit * 0.012], [row + 0.4, row - 0.4],
                    color=BACKGROUND, linewidth=4, solid_capstyle="butt")  # fmt: skip
        label = _spine_label(book, total, lit, unit, scale)
        if STEPS[row] == "paging" and lit in (None, "optimizer"):
            label += f"\n{book['pageable'] / scale:.2g} {unit} may be paged"
        at = min(total, cut) + limit * 0.02
        color = INK if lit is None else FAINT
        ax.text(at, row, label, va="center", fontsize=9, color=color, linespacing=1.3)
    ax.set_xlim(0, limit)
    ax.set_title(title)
    ax.set_xlabel(f"memory ({unit}, 1 {unit} = {scale:,.0f} bytes)", fontsize=9)
    ticks = mpl.ticker.MaxNLocator(4, steps=[1, 2, 5]).tick_values(0, cut)
    ax.set_xticks([t for t in ticks if t <= cut], [f"{t / scale:g}" for t in ticks if t <= cut])
    ax.spines["bottom"].set_bounds(0, cut)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _spine_label(
    book: Mapping[str, float], total: float, lit: str | None, unit: str, scale: float
) -> str:
    """The bar's total, and before it, in bold, the part that is lit."""
    if lit is None:
        return f"{total / scale:.3g} {unit}"
    part = f"{book[lit] / scale:.2f}" if book[lit] else "0"
    return rf"$\bf{{{part}}}$ of {total / scale:.3g} {unit}"


@functools.cache
def _spine_ledgers(activations: bool) -> dict[str, list[dict[str, float]]]:
    """For each of the two models: one ledger a step, as bytes by slice."""
    from transformers import AutoConfig, LlamaConfig

    from qlora_lab import embedded_model

    models = {
        "the embedded model": AutoConfig.from_pretrained(embedded_model()),
        "a 7B model": LlamaConfig(),  # its defaults are LLaMA-7B
    }
    return {
        title: [_spine_ledger(config, step, activations) for step in STEPS]
        for title, config in models.items()
    }


def _spine_ledger(config, step: str, activations: bool) -> dict[str, float]:
    """Bytes by slice for one bar, from the ledger."""
    from qlora_lab.memory import ledger

    book = ledger(
        config,
        {"full fine-tuning": "full", "LoRA": "lora"}.get(step, "qlora"),
        batch=1 if activations else 0,
        checkpointing=True,
        double_quant=step in ("double quantization", "paging"),
        paged=step == "paging",
    )
    return ledger_slices(book) | {
        "pageable": book["optimizer state"].pageable,
        # Without the copy of one weight, which is there with a batch and without.
        "activations": sum(book[n].bytes for n in ("activations", "logits")) if activations else 0,
    }


def _spine_alt(models: Mapping[str, list[dict[str, float]]], lit: str | None) -> str:
    parts = []
    for title, ledgers in models.items():
        totals = [sum(v for k, v in book.items() if k != "pageable") for book in ledgers]
        sizes = [f"{t / 1e9:.3g} GB" if t > 1e9 else f"{t / 1e6:.3g} MB" for t in totals]
        steps = [f"{step} {size}" for step, size in zip(STEPS, sizes, strict=True)]
        parts.append(f"For {title}: {', '.join(steps)}.")
    paged = models["a 7B model"][-1]["pageable"]
    parts.append(f"Of the 7B model's optimizer state, {paged / 1e9:.2g} GB may be paged.")
    subject = f" The slice of the {SLICES[lit]} is highlighted." if lit else ""
    return f"Stacked bars of the memory of a fine-tuning run. {' '.join(parts)}{subject}"


# The memory budget


@styled
def memory_bars(runs: Mapping[str, Mapping[str, float]], limits: Mapping[str, float]) -> Figure:
    """Draw the bytes of several runs as stacked bars, with the memory of cards as lines.

    Args:
        runs: Run -> slice -> bytes, as `ledger_slices` gives them; slices as in `SLICES`.
        limits: Name of a limit -> bytes.

    Returns:
        The figure; the total stands beside each bar.

    Raises:
        InputError: There is no run, or a slice is unknown.
    """
    _not_empty("runs", runs)
    unknown = {name for book in runs.values() for name in book} - set(SLICES)
    if unknown:
        raise InputError(f"slices {sorted(unknown)} are unknown: give some of {', '.join(SLICES)}")
    figure, (ax,) = _figure(1.5 + 0.42 * len(runs))
    longest = max(sum(book.values()) for book in runs.values())
    scale, unit = (1e9, "GB") if longest > 1e9 else (1e6, "MB")
    for row, book in enumerate(runs.values()):
        left = 0.0
        for name in SLICES:
            width = book.get(name, 0) / scale
            ax.barh(row, width, left=left, height=0.62, **_slice_style(name, None))
            left += width
        ax.text(1.01, row, f"{left:.1f} {unit}", transform=ax.get_yaxis_transform(), va="center",
                fontsize=9)  # fmt: skip
    end = 1.04 * max([longest, *limits.values()]) / scale
    places = sorted((limit / scale, name) for name, limit in limits.items())
    for i, (at, name) in enumerate(places):
        for color, width in ((BACKGROUND, 3.2), (INK, 1.2)):  # seen on the bars, too
            ax.axvline(at, color=color, linewidth=width, linestyle=DASHES[1] if width < 2 else "-")
        crowded = [
            abs(at - other) < 0.08 * end for other, _ in (*places[:i][-1:], *places[i + 1 :][:1])
        ]
        side = "center" if not any(crowded) else "left" if i and crowded[0] else "right"
        ax.text(at, -0.62, name, ha=side, va="bottom", fontsize=8.5)
    ax.set_xlim(0, end)
    ax.set_yticks(range(len(runs)), runs)
    ax.set_ylim(len(runs) - 0.5, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(f"memory ({unit}, 1 {unit} = {scale:,.0f} bytes)")
    used = [name for name in SLICES if any(book.get(name) for book in runs.values())]
    handles = [Patch(label=SLICES[name], **_slice_style(name, None)) for name in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1.4)
    totals = [f"{run} {sum(book.values()) / scale:.1f} {unit}" for run, book in runs.items()]
    lines = f" Dashed lines: {_list(list(limits))}." if limits else ""
    figure.alt = f"Stacked bars of memory, in total: {', '.join(totals)}.{lines}"
    return figure


def ledger_slices(book: Ledger) -> dict[str, float]:
    """Sum the rows of a ledger into the slices of the course's pictures.

    Args:
        book: A ledger.

    Returns:
        Slice -> bytes; the copy of one dequantized weight counts as an activation.

    Raises:
        InputError: This is no ledger.
    """
    if not hasattr(book, "rows"):
        raise InputError(f"a ledger {shown(book)} is not possible; give what ledger(...) returned")
    slices = dict.fromkeys(SLICES, 0)
    for row in book.rows:
        slices[_SLICE_OF_ROW.get(row.name, "weights")] += row.bytes
    return slices


_SLICE_OF_ROW = {
    "quantization constants": "constants",
    "embeddings and head": "embeddings",
    "norms, biases, other": "embeddings",
    "buffers": "embeddings",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer state": "optimizer",
    "activations": "activations",
    "logits": "activations",
    "one weight dequantized": "activations",
}
