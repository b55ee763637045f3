"""The figure of chapter 11: what each device holds, and what it sends."""

import pytest

from qlora_lab import plots
from qlora_lab.errors import InputError

PANELS = {
    "held": {"DDP": {"weights": 2e6, "adapters": 1e6}, "FSDP": {"weights": 1e6, "adapters": 5e5}},
    "sent a step": {"DDP": {"gradients": 1e6}, "FSDP": {"weights": 2e6, "gradients": 5e5}},
}
FIGURES = {"columns": lambda: plots.shared_columns(PANELS)}


def test_columns_are_as_high_as_their_bytes():
    figure = FIGURES["columns"]()
    for ax, columns in zip(figure.axes, PANELS.values(), strict=True):
        assert [label.get_text() for label in ax.get_xticklabels()] == list(columns)
        tops = [0.0] * len(columns)
        for bar in ax.patches:
            column = round(bar.get_x() + bar.get_width() / 2)
            tops[column] = max(tops[column], bar.get_y() + bar.get_height())
        assert tops == pytest.approx([sum(stack.values()) / 1e6 for stack in columns.values()])
    assert "held, FSDP: 1.5 MB" in figure.alt and "sent a step, DDP: 1 MB" in figure.alt


def test_bad_columns_are_refused():
    with pytest.raises(InputError, match="panels is empty"):
        plots.shared_columns({})
    with pytest.raises(InputError, match="'wheels'"):
        plots.shared_columns({"held": {"DDP": {"wheels": 4}}})
