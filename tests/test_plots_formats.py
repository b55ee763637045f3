"""The figures of formats and codes: what they count is right, and they can be read."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lab import plots
from qlora_lab.codebooks import dynamic_map, fp4, int_codebook, nf4
from qlora_lab.errors import InputError


def bell(n=400):
    return [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]


FIGURES = {
    "ruler": lambda: plots.codebook_ruler({"NF4": nf4(), "dynamic": dynamic_map(), "FP4": fp4()}),
    "codes": lambda: plots.code_histogram(range(1, 17), nf4()),
    "codes by block": lambda: plots.code_histogram({"16": range(1, 17), "64": [5] * 16}),
    "bits": lambda: plots.error_bars_by_bits(
        {"NF": {2: (0.3, 0.28, 0.33), 4: 0.07}, "int": {2: 0.4, 4: 0.09}}
    ),
    "qq": lambda: plots.qq_plot({"bell": bell(), "flat": range(100)}),
}


def test_ruler_scales_and_counts():
    figure = plots.codebook_ruler({"FP4": fp4(), "int4": int_codebook(4)})
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts == ["15 values", "15 values"]  # FP4 has a zero twice
    marks = figure.axes[0].collections[0].get_segments()
    assert marks[0][0][0] == -1 and marks[-1][0][0] == 1


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=16).filter(any))
def test_histogram_is_in_percent(counts):
    figure = plots.code_histogram(counts)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sum(heights) == pytest.approx(100)
    assert heights == pytest.approx([100 * c / sum(counts) for c in counts])


def test_qq_of_a_bell_curve_is_the_diagonal():
    figure = plots.qq_plot({"bell": [3 + 2 * x for x in bell(4001)]})
    line = figure.axes[0].lines[1]
    assert np.abs(line.get_xdata() - line.get_ydata()).max() < 0.02


def test_hidden_legend_names_nothing():
    errors = {"NF4": {4: 0.1}, "int4": {4: 0.2}}
    assert plots.error_bars_by_bits(errors).axes[0].get_legend() is not None
    hidden = plots.error_bars_by_bits(errors, legend=False)
    assert hidden.axes[0].get_legend() is None and "NF4" not in hidden.alt


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.codebook_ruler({}), "codebooks is empty"),
        (lambda: plots.codebook_ruler({"x": [0, 0]}), "no value but 0"),
        (lambda: plots.code_histogram([0, 0]), "at least one code used"),
        (lambda: plots.code_histogram([1, 2], values=[1]), "same length"),
        (lambda: plots.error_bars_by_bits({"x": {}}), "errors['x'] is empty"),
        (lambda: plots.qq_plot({"x": [1.0] * 50}), "no distribution"),
    ],
)
def test_bad_input_is_one_line(draw, message):
    with pytest.raises(InputError) as error:
        draw()
    assert message in str(error.value) and "\n" not in str(error.value)
