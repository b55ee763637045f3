"""The figures of chapter 6: cards that say what a gradient reads, and plain curves."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from qlora_lab import plots
from qlora_lab.errors import InputError

PARTS = {"$g$": "gradients", r"$\hat W$": "weights"}
CARDS = {
    "of x": (r"$g\,\hat W$", ["$g$", r"$\hat W$"], "goes on"),
    "of B": ("$g^T x A^T$", ["$g$"], "trains B"),
}
FIGURES = {
    "cards": lambda: plots.gradient_cards(CARDS, PARTS, question=r"$\hat W$"),
    "curves": lambda: plots.curves(
        {"ours": ([1, 2], [1e-6, 1e-5]), "theirs": ([1, 2], [1e-3, 1e-2])},
        "step",
        "difference (share of the loss)",
        log="y",
        level=(1e-4, "the bar"),
        markers=True,
        legend="above",
    ),
}


def test_only_what_is_read_is_filled():
    filled = [
        [to_hex(p.get_facecolor()) for p in ax.patches if isinstance(p, Rectangle) and p.get_fill()]
        for ax in FIGURES["cards"]().axes
    ]
    g, w, empty = plots.COLORS["gradients"], plots.COLORS["weights"], plots.BACKGROUND
    assert filled == [[g, w], [g, empty]]
    assert "of x reads g and W; of B reads g." in FIGURES["cards"]().alt


def test_curves_have_their_axes():
    ax = FIGURES["curves"]().axes[0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    assert [list(line.get_ydata()) for line in ax.lines[:2]] == [[1e-6, 1e-5], [1e-3, 1e-2]]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.gradient_cards({}, PARTS),
        lambda: plots.gradient_cards({"of x": ("$g$", ["$h$"], "")}, PARTS),
        lambda: plots.gradient_cards(CARDS, dict.fromkeys(PARTS, "money")),
        lambda: plots.gradient_cards(CARDS, PARTS, question="$x$"),
        lambda: plots.curves({}, "x", "y"),
        lambda: plots.curves({"a": ([], [])}, "x", "y"),
        lambda: plots.curves({"a": ([1, 2], [1])}, "x", "y"),
    ],
)
def test_bad_input_is_refused(draw):
    with pytest.raises(InputError):
        draw()
