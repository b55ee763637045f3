"""The figures of the double quantization chapter: they count right and can be read."""

from __future__ import annotations

import pytest

from qlora_lab import plots
from qlora_lab.errors import InputError

FIGURES = {
    "histogram": lambda: plots.histogram(
        {"bell": [0.5, 1.0, 1.0, 2.0], "model": [0.25, 1.0]}, "scale (share of the mean)", cells=4
    ),
    "storage": lambda: plots.error_by_storage(
        {
            "32-bit scales": {"blocks of 32": (5, 0.07), "64": (4.5, 0.08)},
            "8-bit scales": {"blocks of 32": (4.25, 0.07), "64": (4.13, 0.08)},
        },
        budget=4.2,
    ),
}


def test_every_number_is_in_the_histogram():
    outlines = FIGURES["histogram"]().axes[0].patches[1::2]
    assert [list(each.get_data().values) for each in outlines] == [[25, 50, 0, 25], [50, 50, 0, 0]]
    zeros = plots.histogram({"nothing": [0.0, 0.0]}, "scale", cells=2).axes[0].patches[0]
    assert list(zeros.get_data().values) == [100, 0]


def test_only_the_first_curve_is_labelled():
    figure = FIGURES["storage"]()
    assert [text.get_text() for text in figure.axes[0].texts] == ["64", "blocks of 32", "4.2 bits"]


@pytest.mark.parametrize(
    "draw, words",
    [
        (lambda: plots.histogram({}, "x"), "0 samples: give 1 to 3"),
        (lambda: plots.histogram({"a": []}, "x"), "is empty"),
        (lambda: plots.histogram({"a": [-1.0]}, "x"), "negative numbers"),
        (lambda: plots.error_by_storage({}), "curves is empty"),
        (lambda: plots.error_by_storage({"a": {}}), "is empty"),
    ],
)
def test_bad_input_is_one_line(draw, words):
    with pytest.raises(InputError, match=words) as caught:
        draw()
    assert "\n" not in str(caught.value)
