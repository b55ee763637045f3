"""The figures of sweeps over seeds: what is drawn is what was measured, and it can be read."""

from __future__ import annotations

import pytest
from matplotlib.text import Text

from qlora_lab import plots
from qlora_lab.errors import InputError

LINES = {"orders": {1: [3, 1, 2], 16: [2, 2, 5]}, "codes": {16: [4, 8, 6], 1: [9, 9, 9]}}
FIGURES = {
    "bands": lambda: plots.bands(
        LINES, "rank", "bits", point=(16, 4, "yours"), level=(8, "chance")
    ),
    "dots": lambda: plots.seed_dots({"attention": [1, 2, 9], "MLP": [4, 4, 4]}, "recall (%)"),
}


def test_the_line_is_the_middle_seed_in_the_order_of_the_settings():
    ax = FIGURES["bands"]().axes[0]
    assert [line.get_xydata().tolist() for line in ax.lines[:2]] == [
        [[1, 2], [16, 2]],
        [[1, 9], [16, 6]],
    ]
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 1 and band[:, 1].max() == 5
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "16"]


def test_the_readers_point_and_the_level_are_named():
    figure = FIGURES["bands"]()
    named = [t.get_text() for t in figure.findobj(Text)]
    assert all(name in named and name in figure.alt for name in ("yours", "chance"))


def test_a_logarithmic_axis_has_plain_numbers():
    figure = plots.bands({"orders": {1: [20], 16: [300]}}, "rank", "bits", log="xy")
    figure.draw_without_rendering()
    named = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert {"20", "50", "100", "200"} <= set(named)


def test_every_seed_is_a_dot_and_the_bar_is_their_middle():
    lines = FIGURES["dots"]().axes[0].lines
    assert list(lines[0].get_xdata()) == [2, 2] and list(lines[1].get_xdata()) == [1, 2, 9]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.bands({}, "rank", "bits"),
        lambda: plots.bands({"orders": {}}, "rank", "bits"),
        lambda: plots.bands({"orders": {1: []}}, "rank", "bits"),
        lambda: plots.seed_dots({}, "recall"),
        lambda: plots.seed_dots({"MLP": []}, "recall"),
    ],
)
def test_bad_input_is_refused(draw):
    with pytest.raises(InputError):
        draw()
