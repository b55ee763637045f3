"""What every figure of the course has to be, whatever it shows.

The figures are those that the other modules of tests name in `FIGURES`.
"""

import re
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from matplotlib.text import Text

from qlora_lab import plots

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("test_plots_*.py"))
FIGURES = {
    f"{name}, {figure}": draw
    for name in MODULES
    if name != __name__
    for figure, draw in getattr(import_module(name), "FIGURES", {}).items()
}
WITHOUT_AXES = {"cards", "half bytes"}  # drawings, not diagrams
every_figure = pytest.mark.parametrize("name", FIGURES)


@every_figure
def test_its_text_is_large_and_dark_enough(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            assert plots.contrast(text.get_color(), plots.BACKGROUND) >= 4.5, text.get_text()
            assert text.get_fontsize() >= 8.5, text.get_text()


@every_figure
def test_its_alternative_text_is_one_paragraph(name):
    alt = FIGURES[name]().alt
    assert 40 < len(alt) < 800 and alt.endswith(".") and "\n" not in alt


@pytest.mark.parametrize("name", [n for n in FIGURES if n.partition(", ")[2] not in WITHOUT_AXES])
def test_every_axis_says_what_it_shows(name):
    """Of panels side by side the left one, of panels below each other the lowest, for all."""
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    for ax in figure.axes:
        panels = ax.get_shared_x_axes().get_siblings(ax)
        assert any(says(p.get_xlabel(), p.get_xticklabels()) for p in panels)
        panels = ax.get_shared_y_axes().get_siblings(ax)
        assert any(says(p.get_ylabel(), p.get_yticklabels()) for p in panels)


def says(label, ticks) -> bool:
    """Whether an axis has a label, or names in place of numbers."""
    return bool(label) or any(re.search("[a-zA-Z]{2}", tick.get_text()) for tick in ticks)


def test_an_axis_that_says_nothing_is_found():
    figure = plots.bands({"orders": {1: [2], 4: [3]}}, "", "bits")
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert not says(ax.get_xlabel(), ax.get_xticklabels())
    assert says(ax.get_ylabel(), ax.get_yticklabels())


@every_figure
def test_it_is_the_same_small_file_every_time(name):
    """No date, no random id, no other metadata."""
    first = plots.png(FIGURES[name]())
    assert first == plots.png(FIGURES[name]())
    assert set(png_chunks(first)) == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}  # no text, no time
    assert len(first) < 250_000


def png_chunks(data: bytes) -> Iterator[bytes]:
    """Kinds of the chunks of a PNG file."""
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8]
        at += 12 + length
