"""What every figure of the course has to be, whatever it shows."""

import struct
from collections.abc import Callable, Iterator

from matplotlib.figure import Figure
from matplotlib.text import Text

from qlora_lab import plots


def assert_readable(figure: Figure) -> None:
    """Its text is large and dark enough, and its alternative text is one paragraph."""
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            assert plots.contrast(text.get_color(), plots.BACKGROUND) >= 4.5, text.get_text()
            assert text.get_fontsize() >= 8.5, text.get_text()
    assert 40 < len(figure.alt) < 800 and figure.alt.endswith(".") and "\n" not in figure.alt


def assert_labelled(figure: Figure) -> None:
    """Every axis says what it shows; of panels side by side the left one says it for all."""
    for ax in figure.axes:
        assert ax.get_xlabel()
        panels = ax.get_shared_y_axes().get_siblings(ax)
        assert any(p.get_ylabel() or len(p.get_yticklabels()) for p in panels)


def assert_same_bytes_every_time(draw: Callable[[], Figure]) -> None:
    """Two drawings are one small file: no date, no random id, no other metadata."""
    first = plots.png(draw())
    assert first == plots.png(draw())
    assert set(png_chunks(first)) == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}  # no text, no time
    assert len(first) < 250_000


def png_chunks(data: bytes) -> Iterator[bytes]:
    """Kinds of the chunks of a PNG file."""
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8]
        at += 12 + length
