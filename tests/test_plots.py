"""The figures: legible, in colour and in grey, labelled, the same bytes every time."""

from __future__ import annotations

import io
import itertools
import math
import struct

import matplotlib as mpl
import numpy as np
import pytest
from figures import assert_readable, assert_same_bytes_every_time
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qlora_lab import plots
from qlora_lab.codebooks import dynamic_map, fp4, int_codebook, nf4
from qlora_lab.errors import InputError

GRADES = ("seen forms", "unseen pairs", "corrections")


def bell(n=400):
    from statistics import NormalDist

    return [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]


FIGURES = {
    "spine": lambda: plots.spine(),
    "spine, one lit": lambda: plots.spine("double quantization"),
    "ruler": lambda: plots.codebook_ruler({"NF4": nf4(), "dynamic": dynamic_map(), "FP4": fp4()}),
    "codes": lambda: plots.code_histogram(range(1, 17), nf4()),
    "codes by block": lambda: plots.code_histogram({"16": range(1, 17), "64": [5] * 16}),
    "bits": lambda: plots.error_bars_by_bits(
        {"NF": {2: (0.3, 0.28, 0.33), 4: 0.07}, "int": {2: 0.4, 4: 0.09}}
    ),
    "qq": lambda: plots.qq_plot({"bell": bell(), "flat": range(100)}),
    "loss": lambda: plots.loss_curve(
        {"QLoRA": [3, 2, 1.5, 1.2], "LoRA": [3, 2, 1.4, 1.1]}, {"QLoRA": ([2] * 4, [4] * 4)}, 2
    ),
    "grades": lambda: plots.grade_table_bars(
        dict.fromkeys(GRADES, 0),
        dict(zip(GRADES, (99, 80, 60), strict=True)),
        {GRADES[1]: (70, 88)},
    ),
}
every_figure = pytest.mark.parametrize("name", FIGURES)


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


# Every figure


@every_figure
def test_axes_are_labelled_and_text_is_legible_also_without_eyes(name):
    figure = FIGURES[name]()
    for ax in figure.axes:
        assert ax.get_xlabel()
        panels = ax.get_shared_y_axes().get_siblings(ax)  # the left one has the labels for all
        assert any(p.get_ylabel() or len(p.get_yticklabels()) for p in panels)
    assert_readable(figure)


@every_figure
def test_same_bytes_every_time_and_no_metadata(name):
    assert_same_bytes_every_time(FIGURES[name])
    first = plots.png(FIGURES[name]())
    kinds = set(png_chunks(first))
    assert kinds == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}  # no text, no time
    assert len(first) < 250_000


def png_chunks(data):
    """Kinds of the chunks of a PNG file."""
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8]
        at += 12 + length


def test_a_second_rendering_of_one_figure_is_the_same():
    figure = FIGURES["loss"]()
    assert plots.png(figure) == plots.png(figure)


def test_image_is_opaque_and_as_wide_as_the_page():
    image = Image.open(io.BytesIO(plots.png(FIGURES["codes"]())))
    assert image.width == 2 * 720
    assert np.asarray(image.convert("RGBA"))[..., 3].min() == 255


def test_what_the_notebook_has_set_does_not_matter():
    expected = plots.png(FIGURES["codes"]())
    with mpl.rc_context({"font.size": 30, "figure.facecolor": "red", "axes.facecolor": "blue"}):
        assert plots.png(FIGURES["codes"]()) == expected


# The spine


def test_spine_is_the_ledgers():
    from transformers import LlamaConfig

    from qlora_lab.memory import ledger

    book = ledger(LlamaConfig(), "full", batch=0)
    assert f"full fine-tuning {book.total / 1e9:.3g} GB" in plots.spine().alt
    bars = plots._spine_ledgers(False)["a 7B model"]
    without, with_it = (bars[plots.STEPS.index(s)] for s in ("4 bits", "double quantization"))
    for bar, double_quant in ((without, False), (with_it, True)):
        one = ledger(LlamaConfig(), batch=0, double_quant=double_quant)
        assert bar["constants"] == one["quantization constants"].bytes
        # all the ledger but its temporary row
        temporary = one["one weight dequantized"].bytes
        assert sum(v for k, v in bar.items() if k != "pageable") == one.total - temporary


def test_the_story_differs_with_size():
    small, large = plots._spine_ledgers(False).values()
    small, large = small[-1], large[-1]
    assert small["adapters"] + small["optimizer"] > small["weights"]
    assert large["adapters"] + large["optimizer"] < 0.2 * large["weights"]
    assert small["pageable"] == 0 < large["pageable"]


@pytest.mark.parametrize("stage", [*plots.STEPS, *(s for s in plots.SLICES if s != "activations")])
def test_one_slice_is_lit(stage):
    figure = plots.spine(stage)
    lit = plots._LIT_BY_STEP.get(stage, stage)
    colors = {p.get_facecolor() for ax in figure.axes for p in ax.patches if p.get_fill()}
    full = {name: mpl.colors.to_rgba(color) for name, color in plots.COLORS.items()}
    assert [name for name in full if full[name] in colors] == [lit]
    assert plots.SLICES[lit] in figure.alt


def test_spine_with_activations():
    figure = plots.spine("activations")
    assert plots.SLICES["activations"] in [t.get_text() for t in figure.legends[0].get_texts()]
    small, large = plots._spine_ledgers(True).values()
    assert small[-1]["activations"] > small[-1]["weights"]
    assert large[-1]["activations"] < large[-1]["weights"]


# Data in, data drawn


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


def test_loss_curve_smooths_without_lag():
    straight = [10.0 - i for i in range(10)]
    line = plots.loss_curve({"run": straight}, smooth=3).axes[0].lines[1]
    assert list(line.get_ydata()[1:-1]) == pytest.approx(straight[1:-1])


def test_grades_in_the_given_order():
    figure = FIGURES["grades"]()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(GRADES)
    assert [t.get_text() for t in figure.axes[0].texts] == [
        "0 %",
        "99 %",
        "0 %",
        "80 %",
        "0 %",
        "60 %",
    ]


# Showing


def test_show_stores_alt_text_and_width(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: shown.append((a, k)))
    figure = FIGURES["codes"]()
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


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.spine("head"), "stage 'head'"),
        (lambda: plots.codebook_ruler({}), "codebooks is empty"),
        (lambda: plots.codebook_ruler({"x": [0, 0]}), "no value but 0"),
        (lambda: plots.code_histogram([0, 0]), "at least one code used"),
        (lambda: plots.code_histogram([1, 2], values=[1]), "same length"),
        (lambda: plots.error_bars_by_bits({"x": {}}), "errors['x'] is empty"),
        (lambda: plots.qq_plot({"x": [1.0] * 50}), "no distribution"),
        (lambda: plots.loss_curve({"x": []}), "losses['x'] is empty"),
        (lambda: plots.loss_curve({"x": [1]}, smooth=0), "smooth 0"),
        (lambda: plots.grade_table_bars({"a": 1}, {"b": 1}), "grades differ"),
        (lambda: plots.grade_table_bars({"a": 1}, {"a": 101}), "score 101"),
        (lambda: plots.curves([1, 2], "x", "y"), "curves cannot draw this"),
        (lambda: plots.curves({"a": [1.0, 2.0]}, "x", "y"), "give lines: Mapping[str, tuple["),
        (lambda: plots.qq_plot(3), "give samples: Mapping[str, Sequence[float]]"),
        (lambda: plots.loss_curve({"a": ["x"]}), "give losses: Mapping"),
        (lambda: plots.ledger_slices(3), "a ledger 3 is not possible"),
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
