"""The figures of the quantization chapters: what they count is right, and they can be read."""

from __future__ import annotations

from statistics import NormalDist

import pytest
from matplotlib.text import Text

from qlora_lab import plots
from qlora_lab.codebooks import int_codebook, nf4, paper_eq4
from qlora_lab.errors import InputError
from qlora_lab.plots import weights

BLOCK = [-1.0, -0.2, 0.0, 0.1, 0.3, 0.9]
QUARTERS = [-float("inf"), *(NormalDist().inv_cdf(i / 4) for i in (1, 2, 3)), float("inf")]

FIGURES = {
    "weights and marks": lambda: plots.weights_and_marks(
        BLOCK, {"int4": int_codebook(4), "NF4": nf4()}, block=BLOCK
    ),
    "slices": lambda: plots.bell_slices(
        {"equation 4": (QUARTERS, paper_eq4(2)), "NF4": (nf4(), nf4())}
    ),
    "half bytes": lambda: plots.half_bytes([0.5, -0.25, 0.0, 0.1], [15, 0, 7, 8]),
    "differences": lambda: plots.differences(
        {"NF4": (0.01, -0.01, 0.02), "int4": (0.03, 0.01, 0.05)}, "added bits per byte"
    ),
}


def texts(figure):
    return [t.get_text() for t in figure.findobj(Text) if t.get_text().strip()]


def test_marks_say_whom_they_serve():
    # -1 | -0.2, 0, 0.1, 0.3 | 0.9: nearest to -1, 0 and 1
    assert weights._shares(BLOCK, (-1, 0, 1)) == [1 / 6, 4 / 6, 1 / 6]
    figure = plots.weights_and_marks(BLOCK, {"ternary": (-1, 0, 1)})
    assert [t for t in texts(figure) if t in ("17", "67")] == ["17", "67", "17"]


def test_every_weight_is_in_the_histogram():
    figure = plots.weights_and_marks(BLOCK, {"ternary": (-1, 0, 1)})
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sum(heights) == pytest.approx(100)
    assert heights[0] == pytest.approx(100 / 6)  # the weight of exactly -1


def test_infinite_marks_are_arrows():
    assert any("\N{INFINITY}" in t for t in texts(FIGURES["slices"]()))
    assert not any("\N{INFINITY}" in t for t in texts(plots.bell_slices({"NF4": (nf4(), nf4())})))


def test_bytes_hold_the_first_code_high():
    assert {"byte 240", "byte 120"} <= set(texts(FIGURES["half bytes"]()))
    assert "(240 and 120)" in FIGURES["half bytes"]().alt


def test_only_an_interval_without_zero_is_filled():
    figure = FIGURES["differences"]()
    filled = [
        line.get_markerfacecolor() == plots.COLORS["weights"]
        for line in figure.axes[0].lines
        if line.get_marker() == "o"
    ]
    assert filled == [False, True]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.weights_and_marks([], {"int4": int_codebook(4)}),
        lambda: plots.weights_and_marks(BLOCK, {}),
        lambda: plots.weights_and_marks([1.5], {"int4": int_codebook(4)}),
        lambda: plots.bell_slices({}),
        lambda: plots.bell_slices(dict.fromkeys("abcd", (nf4(), nf4()))),
        lambda: plots.half_bytes([0.1], [7]),
        lambda: plots.half_bytes([0.1, 0.2], [7]),
        lambda: plots.half_bytes([0.0] * 10, [7] * 10),
        lambda: plots.half_bytes([0.1, 0.2], [7, 16]),
        lambda: plots.differences({}, "bits"),
    ],
)
def test_bad_input_is_refused(draw):
    with pytest.raises(InputError):
        draw()
