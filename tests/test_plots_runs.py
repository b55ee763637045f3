"""The figures of runs: losses without lag, grades in their order, and they can be read."""

from __future__ import annotations

import pytest

from qlora_lab import plots
from qlora_lab.errors import InputError

GRADES = ("seen forms", "unseen pairs", "corrections")
FIGURES = {
    "loss": lambda: plots.loss_curve(
        {"QLoRA": [3, 2, 1.5, 1.2], "LoRA": [3, 2, 1.4, 1.1]}, {"QLoRA": ([2] * 4, [4] * 4)}, 2
    ),
    "grades": lambda: plots.grade_table_bars(
        dict.fromkeys(GRADES, 0),
        dict(zip(GRADES, (99, 80, 60), strict=True)),
        {GRADES[1]: (70, 88)},
    ),
}


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


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.loss_curve({"x": []}), "losses['x'] is empty"),
        (lambda: plots.loss_curve({"x": [1]}, smooth=0), "smooth 0"),
        (lambda: plots.grade_table_bars({"a": 1}, {"b": 1}), "grades differ"),
        (lambda: plots.grade_table_bars({"a": 1}, {"a": 101}), "score 101"),
    ],
)
def test_bad_input_is_one_line(draw, message):
    with pytest.raises(InputError) as error:
        draw()
    assert message in str(error.value) and "\n" not in str(error.value)
