"""What several modules refuse, in one sentence each."""

import numpy as np
import pytest

from qlora_lab.errors import InputError, above_zero, texts_of, whole


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
