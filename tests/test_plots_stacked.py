"""Stacked bytes: the spine is the ledger's, and lights what a chapter is about."""

from __future__ import annotations

import matplotlib as mpl
import pytest

from qlora_lab import plots
from qlora_lab.errors import InputError
from qlora_lab.plots import stacked

FIGURES = {
    "spine": lambda: plots.spine(),
    "spine, one lit": lambda: plots.spine("double quantization"),
}


def test_spine_is_the_ledgers():
    from transformers import LlamaConfig

    from qlora_lab.memory import ledger

    book = ledger(LlamaConfig(), "full", batch=0)
    assert f"full fine-tuning {book.total / 1e9:.3g} GB" in plots.spine().alt
    bars = stacked._spine_ledgers(False)["a 7B model"]
    without, with_it = (bars[plots.STEPS.index(s)] for s in ("4 bits", "double quantization"))
    for bar, double_quant in ((without, False), (with_it, True)):
        one = ledger(LlamaConfig(), batch=0, double_quant=double_quant)
        assert bar["constants"] == one["quantization constants"].bytes
        # all the ledger but its temporary row
        temporary = one["one weight dequantized"].bytes
        assert sum(v for k, v in bar.items() if k != "pageable") == one.total - temporary


def test_the_story_differs_with_size():
    small, large = stacked._spine_ledgers(False).values()
    small, large = small[-1], large[-1]
    assert small["adapters"] + small["optimizer"] > small["weights"]
    assert large["adapters"] + large["optimizer"] < 0.2 * large["weights"]
    assert small["pageable"] == 0 < large["pageable"]


@pytest.mark.parametrize("stage", [*plots.STEPS, *(s for s in plots.SLICES if s != "activations")])
def test_one_slice_is_lit(stage):
    figure = plots.spine(stage)
    lit = stacked._LIT_BY_STEP.get(stage, stage)
    colors = {p.get_facecolor() for ax in figure.axes for p in ax.patches if p.get_fill()}
    full = {name: mpl.colors.to_rgba(color) for name, color in plots.COLORS.items()}
    assert [name for name in full if full[name] in colors] == [lit]
    assert plots.SLICES[lit] in figure.alt


def test_spine_with_activations():
    figure = plots.spine("activations")
    assert plots.SLICES["activations"] in [t.get_text() for t in figure.legends[0].get_texts()]
    small, large = stacked._spine_ledgers(True).values()
    assert small[-1]["activations"] > small[-1]["weights"]
    assert large[-1]["activations"] < large[-1]["weights"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.spine("head"), "stage 'head'"),
        (lambda: plots.ledger_slices(3), "a ledger 3 is not possible"),
    ],
)
def test_bad_input_is_one_line(draw, message):
    with pytest.raises(InputError) as error:
        draw()
    assert message in str(error.value) and "\n" not in str(error.value)
