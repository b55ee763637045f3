"""The course's figures: one style, read in colour, in grey, on a light and on a dark page.

Each function takes data and returns a matplotlib `Figure` with labelled axes, units and an
alternative text in `figure.alt`. `show` puts it into a notebook as a PNG whose bytes depend on
nothing but the picture, with the alternative text beside it.

Four choices, and what the others would cost:

1. *An opaque white figure, not a transparent one.* Text needs a contrast of 4.5 to 1 (WCAG AA).
   On white that asks for a luminance of at most 0.183, on a page of #121212 for at least 0.202:
   no colour does both, so text on a transparent figure is too faint somewhere. Inside its own
   white rectangle it has its full contrast in every viewer. The web book, which knows its mode,
   turns the picture dark with one CSS rule (`DARK_FILTER`): white becomes the page's #121212, and
   each colour keeps its hue.
2. *Colours that differ in lightness*, not in hue alone, from L* 24 to 88 in steps of 6 or more:
   the same picture printed in grey still tells its parts apart. Hatches, markers and direct labels
   say it again. The hues stay apart for colour-blind readers, too (the tests simulate three kinds).
3. *The same slice has the same colour in every chapter*: `COLORS` is by meaning.
4. *No pyplot.* A `Figure` made directly belongs to no global state: nothing is drawn twice, no
   window opens, and a notebook's figures do not depend on the order of its cells.

Source: Okabe and Ito, Color Universal Design (2008), for the hues; WCAG 2.2, success criteria
1.4.1, 1.4.3 and 1.4.11.
"""

from __future__ import annotations

import functools
import inspect
import io
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist, fmean, pstdev
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from qlora_lab.errors import InputError, shown

if TYPE_CHECKING:
    from qlora_lab.memory import Ledger

BACKGROUND, INK, FAINT, GRID = "#ffffff", "#20262e", "#5b6470", "#e3e6ea"
DARK_PAGE = "#121212"
DARK_FILTER = "invert(0.93) hue-rotate(180deg)"
"""CSS filter that a dark page puts on these figures: white becomes `DARK_PAGE`."""

COLORS = {
    "weights": "#123a66",
    "activations": "#7a4a9e",
    "constants": "#c4500c",
    "adapters": "#1e9a74",
    "optimizer": "#64b5e8",
    "gradients": "#f2c14e",
    "embeddings": "#ccd2da",
}
"""Colour of each slice of memory, from dark to light."""

SEQUENCE = tuple(COLORS[k] for k in ("weights", "constants", "adapters", "activations"))
"""Colours for lines and marks that have no meaning of their own, each 3:1 or more on white."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1)))
HATCHES = {"constants": "////", "gradients": "...."}

WIDTH = 7.5  # inches; 720 CSS pixels, the width of a page's text
STYLE = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so it is the same everywhere
    "mathtext.fontset": "dejavusans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": BACKGROUND,
    "axes.facecolor": BACKGROUND,
    "savefig.facecolor": BACKGROUND,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "hatch.color": BACKGROUND,
    "hatch.linewidth": 1.0,
    "path.simplify": False,  # the same picture whatever the number of points
}


# Making and showing


# What comes of a list where a mapping is meant, or of words where there should be numbers.
_OF_THE_DATA = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a drawing function under the course's style, whatever the notebook has set.

    Args:
        draw: A function that returns a figure.

    Returns:
        The function, with the same arguments.
    """

    takes = ", ".join(
        f"{name}: {each.annotation}"
        for name, each in inspect.signature(draw).parameters.items()
        if each.default is each.empty
    )
    wants = f"give {takes}" if takes else "see its arguments"

    @functools.wraps(draw)
    def wrapper(*args, **kwargs) -> Figure:
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(STYLE)
            if draw.__module__ != __name__:  # a reader's own: he wants to see where it fails
                return draw(*args, **kwargs)
            try:
                return draw(*args, **kwargs)
            except InputError:
                raise
            except _OF_THE_DATA as error:
                reason = f"{type(error).__name__}: {error}".partition("\n")[0][:80]
                # With its cause: the fault may be ours, and then the sentence does not help.
                raise InputError(f"{draw.__name__} cannot draw this ({reason}); {wants}") from error

    return wrapper


def png(figure: Figure, scale: int = 2) -> bytes:
    """Render a figure to PNG bytes that depend on the picture alone.

    Args:
        figure: The figure.
        scale: Image pixels per CSS pixel; 2 is sharp on every screen.

    Returns:
        PNG bytes without date, software name or any other metadata.
    """
    stream = io.BytesIO()
    if figure.get_layout_engine() is not None:  # lay out once: each further draw would nudge it
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure.savefig(stream, format="png", dpi=96 * scale, metadata={"Software": None})
    return stream.getvalue()


def show(figure: Figure, alt: str | None = None) -> None:
    """Display a figure in a notebook, with its alternative text stored beside it.

    The text is the output's `text/plain` (which nbval compares, so it must say nothing that
    differs between machines) and the image's `alt`.

    Args:
        figure: A figure.
        alt: What the picture shows, in a sentence or two; default is `figure.alt`.

    Raises:
        InputError: There is no alternative text, or no figure.
    """
    from IPython.display import display

    if not isinstance(figure, Figure):
        raise InputError(f"a figure {shown(figure)} is not possible; give what a picture returned")
    if not isinstance(alt, str | None):
        raise InputError(f"alt {shown(alt)} is not possible; say in words what the picture shows")
    text = (alt or getattr(figure, "alt", "")).strip()
    if not text:
        raise InputError("this figure has no alternative text: give alt='what the picture shows'")
    width = round(figure.get_figwidth() * 96)
    display(
        {"image/png": png(figure), "text/plain": text},
        metadata={"image/png": {"alt": text, "width": width}},
        raw=True,
    )


def _figure(height: float, columns: int = 1, **kwargs) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **kwargs)[0]
    return figure, list(axes)


def contrast(color: str, other: str) -> float:
    """Return the WCAG contrast ratio of two colours.

    Args:
        color: "#rrggbb" or any colour matplotlib knows.
        other: The same.

    Returns:
        1 (the same) to 21 (black on white); text needs 4.5.

    Source:
        WCAG 2.2, definition of contrast ratio.
    """
    bright, dark = sorted((_luminance(color), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    def linear(c: float) -> float:
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(c) for c in mpl.colors.to_rgb(color))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _look(i: int) -> dict:
    """Colour, marker and dashes of the i-th line: told apart by any one of the three."""
    return {
        "color": SEQUENCE[i % len(SEQUENCE)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
    }


def _washed(color: str, share: float = 0.62) -> tuple[float, float, float]:
    """The colour mixed with the background, for what is not the subject."""
    return tuple(c + (1 - c) * share for c in mpl.colors.to_rgb(color))


def _list(names: Sequence[str]) -> str:
    names = [str(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# The spine


SLICES = {
    "weights": "weights of the linear layers",
    "constants": "quantization constants",
    "embeddings": "embeddings, head, norms",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations and logits",
}
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


def _slice_style(name: str, lit: str | None) -> dict:
    """Look of one slice; a thin lit slice must not drown in the white lines between slices."""
    if lit is None:
        hatch = HATCHES.get(name, "")
        return {
            "facecolor": COLORS[name],
            "edgecolor": BACKGROUND,
            "linewidth": 0.5,
            "hatch": hatch,
        }
    if name == lit:
        return {"facecolor": COLORS[name], "edgecolor": COLORS[name], "linewidth": 0.8, "zorder": 2}
    return {"facecolor": _washed(COLORS[name]), "edgecolor": BACKGROUND, "linewidth": 0.5}


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


# Formats and codes


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


# Weights and marks, slices, half bytes, differences


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


# Runs


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


# Small things


def _not_empty(name: str, given: Sequence | Mapping) -> None:
    if not len(given):
        raise InputError(f"{name} is empty: there is nothing to draw")


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _triple(error: float | tuple[float, float, float]) -> tuple[float, float, float]:
    return error if isinstance(error, tuple) else (error, error, error)


def _quantile(ordered: Sequence[float], probability: float) -> float:
    """Quantile of sorted numbers, linear between neighbours."""
    position = probability * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


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


# Histograms, and error against what is stored


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


# Gradients


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


# Two devices


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


# Sweeps over seeds


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
