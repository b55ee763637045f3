"""The course's one style: colours by meaning, what matplotlib is told, how a figure is shown.

Every family of pictures draws with what stands here and with nothing of another family. Why the
figures look as they do, and what the other choices would cost, says the package, `qlora_lab.plots`.
"""

from __future__ import annotations

import functools
import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qlora_lab.errors import InputError, shown

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

SLICES = {
    "weights": "weights of the linear layers",
    "constants": "quantization constants",
    "embeddings": "embeddings, head, norms",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations and logits",
}

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
            if not str(draw.__module__).startswith(f"{__package__}."):
                # a reader's own: he wants to see where it fails
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


# Colours and looks


def contrast(color: str, other: str) -> float:
    """Return the WCAG contrast ratio of two colours.

    Args:
        color: "#rrggbb" or any colour matplotlib knows.
        other: The same.

    Returns:
        1 (the same) to 21 (black on white); text needs 4.5.

    Raises:
        InputError: One of them is no colour.

    Source:
        WCAG 2.2, definition of contrast ratio.
    """
    for given in (color, other):
        if not mpl.colors.is_color_like(given):
            raise InputError(f"color {shown(given)} is not possible; give '#rrggbb' or a name")
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


# Small things


def _list(names: Sequence[str]) -> str:
    names = [str(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _not_empty(name: str, given: Sequence | Mapping) -> None:
    if not len(given):
        raise InputError(f"{name} is empty: there is nothing to draw")


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _quantile(ordered: Sequence[float], probability: float) -> float:
    """Quantile of sorted numbers, linear between neighbours."""
    position = probability * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
