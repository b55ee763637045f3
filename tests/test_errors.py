"""What several modules refuse, in one sentence each."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_lab.errors import InputError, above_zero, needs, share, shown, texts_of, whole
from qlora_lab.loading import Loaded

LOADED = Loaded(torch.nn.Linear(1, 1), None, None)


@pytest.mark.parametrize("value", [0, -1, 11, 1.0, "3", None, True, float("nan")])
def test_what_is_no_whole_number_in_the_range_is_refused(value):
    with pytest.raises(InputError) as caught:
        whole("rank", value, 1, 10)
    said = f"rank {value!r} is not possible; give a whole number from 1 to 10"
    assert str(caught.value) == said


def test_whole_numbers_in_the_range_pass():
    for value in (1, 10, np.int64(3)):
        whole("rank", value, 1, 10)
    whole("steps", 10**12)
    with pytest.raises(InputError, match="from 1 on"):
        whole("steps", 0)


@pytest.mark.parametrize("value", [0, -1e-9, float("inf"), float("nan"), "1e-3", None, True])
def test_what_is_not_above_zero_is_refused(value):
    with pytest.raises(InputError, match="lr .* is not possible; give a finite number above 0"):
        above_zero("lr", value)


def test_numbers_above_zero_pass():
    for value in (1, 1e-9, np.float32(2.0)):
        above_zero("lr", value)


@pytest.mark.parametrize("row", [{"text": "a tea"}, {"text": "a tea", "answer": 3}, "a tea", None])
def test_a_row_without_its_texts_is_refused(row):
    with pytest.raises(InputError, match="a row needs 'text' and 'answer'; this one has"):
        texts_of(row, "text", "answer")


def test_the_texts_come_in_the_order_asked_for():
    assert texts_of({"answer": "{}", "text": "a tea"}, "text", "answer") == ["a tea", "{}"]


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan"), "0.5", None, True])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(InputError, match="dropout .* is not possible; give 0 or more, below 1"):
        share("dropout", value)


def test_shares_pass():
    for value in (0, 0.0, 0.999, np.float32(0.5)):
        share("dropout", value)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("tensor", [[1.0]], r"\[\[1.0\]\] is not possible; give a torch tensor"),
        ("tensor", torch.Tensor, "of type _TensorMeta"),
        ("model", LOADED, "model of type Loaded is not possible; .* its .model"),
        ("tokenizer", LOADED, "tokenizer of type Loaded is not possible; .* its .tokenizer"),
        ("texts", "a tea", "'a tea' is not possible; give a list of texts"),
        ("texts", {"a.py": "import a"}, "give a list of texts"),
        ("texts", [3], r"\[3\] is not possible"),
        ("rows", 3, "rows 3 is not possible; give a list of rows"),
        ("path", "", "path '' is not possible"),
        ("path", None, "path None is not possible"),
    ],
)
def test_what_is_of_another_kind_is_refused(kind, value, says):
    with pytest.raises(InputError, match=says) as caught:
        needs(kind, value)
    assert "\n" not in str(caught.value)


def test_what_is_of_its_kind_passes():
    needs("tensor", torch.ones(1))
    needs("model", torch.nn.Linear(1, 1))
    for texts in ([], ["a"], ("a", "b")):
        needs("texts", texts)
    needs("rows", iter([]))
    needs("path", Path("here"))


@pytest.mark.parametrize(
    "value", [torch.ones(3, 3), torch.nn.Linear(2, 2), LOADED, list(range(99))]
)
def test_a_value_is_shown_on_one_short_line(value):
    assert len(shown(value)) <= 80 and "\n" not in shown(value)
