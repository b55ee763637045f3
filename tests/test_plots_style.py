"""The common style: legible colours for everyone, the same bytes every time, an alt text beside."""

from __future__ import annotations

import io
import itertools
import math

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from qlora_lab import plots
from qlora_lab.codebooks import nf4
from qlora_lab.errors import InputError


def codes():
    return plots.code_histogram(range(1, 17), nf4())


# Colours


def css_filter(color):
    """What the dark page's CSS filter makes of a colour: invert(0.93), then hue-rotate(180deg)."""
    assert plots.DARK_FILTER == "invert(0.93) hue-rotate(180deg)"
    inverted = [0.93 + c * (1 - 2 * 0.93) for c in mpl.colors.to_rgb(color)]
    matrix = np.array(  # filter effects module level 1, hue-rotate at 180 degrees
        [[-0.574, 1.430, 0.144], [0.426, 0.430, 0.144], [0.426, 1.430, -0.856]]
    )
    return tuple(np.clip(matrix @ inverted, 0, 1))


def lab(color):
    """CIE L*a*b* of an sRGB colour (D65)."""
    rgb = np.array(mpl.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = to_xyz @ linear / np.array([0.9505, 1, 1.089])
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


# Machado, Oliveira and Fernandes (2009), severity 1.0, for linear RGB
COLOR_BLIND = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def seen_by(color, kind):
    rgb = np.array(mpl.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(COLOR_BLIND[kind]) @ linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_contrast_is_wcags():
    assert plots.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert plots.contrast("#ffffff", "#ffffff") == 1
    assert plots.contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
    with pytest.raises(InputError, match="'snow white'"):
        plots.contrast("#ffffff", "snow white")


def test_no_colour_is_legible_on_both_pages():
    """Why the figures are opaque: the best mid-grey reaches 4.33 on white and on #121212."""
    greys = (f"#{v:02x}{v:02x}{v:02x}" for v in range(256))
    both = [min(plots.contrast(g, "#ffffff"), plots.contrast(g, plots.DARK_PAGE)) for g in greys]
    assert 4.2 < max(both) < 4.5


@pytest.mark.parametrize("text", [plots.INK, plots.FAINT])
def test_text_has_contrast_in_both_modes(text):
    assert plots.contrast(text, plots.BACKGROUND) >= 4.5
    assert plots.contrast(css_filter(text), plots.DARK_PAGE) >= 4.5


def test_dark_filter_makes_the_background_the_dark_page():
    made = css_filter(plots.BACKGROUND)
    assert mpl.colors.to_hex(made) == plots.DARK_PAGE


def test_lines_stand_out_in_both_modes():
    for color in plots.SEQUENCE:
        assert plots.contrast(color, plots.BACKGROUND) >= 3
        assert plots.contrast(css_filter(color), plots.DARK_PAGE) >= 3


def test_slices_differ_in_grey():
    lightness = sorted(lab(color)[0] for color in plots.COLORS.values())
    steps = [b - a for a, b in itertools.pairwise(lightness)]
    assert min(steps) >= 3 and lightness[-1] - lightness[0] > 55


@pytest.mark.parametrize("kind", COLOR_BLIND)
def test_slices_differ_for_everyone(kind):
    seen = {name: lab(seen_by(color, kind)) for name, color in plots.COLORS.items()}
    for a, b in itertools.combinations(seen, 2):
        assert math.dist(seen[a], seen[b]) >= 15, f"{a} and {b} look alike with {kind}"


# Rendering


def test_a_second_rendering_of_one_figure_is_the_same():
    figure = plots.loss_curve({"QLoRA": [3, 2, 1.5, 1.2]}, {"QLoRA": ([2] * 4, [4] * 4)}, 2)
    assert plots.png(figure) == plots.png(figure)


def test_image_is_opaque_and_as_wide_as_the_page():
    image = Image.open(io.BytesIO(plots.png(codes())))
    assert image.width == 2 * 720
    assert np.asarray(image.convert("RGBA"))[..., 3].min() == 255


def test_what_the_notebook_has_set_does_not_matter():
    expected = plots.png(codes())
    with mpl.rc_context({"font.size": 30, "figure.facecolor": "red", "axes.facecolor": "blue"}):
        assert plots.png(codes()) == expected


# Showing


def test_show_stores_alt_text_and_width(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: shown.append((a, k)))
    figure = codes()
    plots.show(figure)
    plots.show(figure, alt="Another sentence.")
    (data,), options = shown[0]
    assert data["text/plain"] == figure.alt and data["image/png"] == plots.png(figure)
    assert options == {
        "metadata": {"image/png": {"alt": figure.alt, "width": 720}},
        "raw": True,
    }
    assert shown[1][0][0]["text/plain"] == "Another sentence."


def test_show_wants_an_alt_text():
    with pytest.raises(InputError, match="alternative text"):
        plots.show(mpl.figure.Figure())


# What cannot be drawn


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.curves([1, 2], "x", "y"), "curves cannot draw this"),
        (lambda: plots.curves({"a": [1.0, 2.0]}, "x", "y"), "give lines: Mapping[str, tuple["),
        (lambda: plots.qq_plot(3), "give samples: Mapping[str, Sequence[float]]"),
        (lambda: plots.loss_curve({"a": ["x"]}), "give losses: Mapping"),
        (lambda: plots.show("picture"), "a figure 'picture' is not possible"),
    ],
)
def test_bad_input_is_one_line(draw, message):
    with pytest.raises(InputError) as error:
        draw()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_picture_of_the_readers_own_fails_where_it_fails():
    def drawn():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        plots.styled(drawn)()


def test_what_a_picture_could_not_draw_keeps_its_cause():
    with pytest.raises(InputError) as caught:
        plots.curves([1, 2], "x", "y")
    assert isinstance(caught.value.__cause__, AttributeError)
