"""What every figure of the course has to be, whatever it shows."""

from collections.abc import Callable

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


def assert_same_bytes_every_time(draw: Callable[[], Figure]) -> None:
    """Two drawings are one file: no date, no random id."""
    assert plots.png(draw()) == plots.png(draw())
