"""Intervals against what is known of luck: exact, normal, or drawn many times."""

import numpy as np
import pytest

from qlora_lab import intervals
from qlora_lab.errors import InputError


def test_interval_is_seeded_and_holds_the_mean():
    values = [1, 0, 1, 1, 0, 1, 1, 1, 0, 1] * 10
    first = intervals.bootstrap_interval(values)
    assert first == intervals.bootstrap_interval(values)
    uneven = np.random.default_rng(0).normal(size=50)
    other = intervals.bootstrap_interval(uneven, seed=1)
    assert other != intervals.bootstrap_interval(uneven, seed=2)
    mean, low, high = first
    # the normal approximation: 0.7 +- 1.96 * sqrt(0.7 * 0.3 / 100)
    assert mean == 0.7 and low == pytest.approx(0.61, abs=0.015)
    assert high == pytest.approx(0.79, abs=0.015)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        values = rng.normal(3.0, 1.0, size=60)
        _, low, high = intervals.bootstrap_interval(values, resamples=600, seed=trial)
        hits += low <= 3.0 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_interval_of_equal_values_has_no_width():
    assert intervals.bootstrap_interval([1.0] * 20) == (1.0, 1.0, 1.0)


def test_weighted_interval_is_of_the_ratio():
    bits, sizes = [8.0, 30.0, 2.0], [10, 20, 2]
    mean, low, high = intervals.bootstrap_interval(bits, weights=sizes)
    assert mean == 40 / 32 and low >= 0.8 and high <= 1.5


def test_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(1)
    hard = rng.normal(size=200)
    first, second = hard, hard + 0.1 + 0.05 * rng.normal(size=200)
    mean, low, high = intervals.paired_difference(first, second)
    assert mean == pytest.approx(np.mean(second) - np.mean(first)) and 0 < low < mean < high
    _, alone_low, alone_high = intervals.bootstrap_interval(first)
    assert (high - low) < 0.2 * (alone_high - alone_low)
    back = intervals.paired_difference(second, first)
    np.testing.assert_allclose(back, (-mean, -high, -low), atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intervals.bootstrap_interval([]), "equally long"),
        (lambda: intervals.bootstrap_interval([1, 2], weights=[1]), "equally long"),
        (lambda: intervals.bootstrap_interval([1, 2], confidence=95), "confidence 95"),
        (lambda: intervals.paired_difference([1, 2], [1]), "not pairs"),
        (lambda: intervals.paired_difference([1, 2], [1, float("nan")]), "NaN or infinity"),
        (lambda: intervals.paired_difference(1, 2), "not pairs"),
        (lambda: intervals.paired_difference(["a"], ["b"]), "first .* give a list of numbers"),
        (lambda: intervals.bootstrap_interval([1, float("inf")]), "values hold NaN or infinity"),
        (lambda: intervals.bootstrap_interval([1, 2], [0, 0]), "a weight is 0 or less"),
        (lambda: intervals.bootstrap_interval([1, 2], [1, float("nan")]), "weights hold NaN"),
        (lambda: intervals.bootstrap_interval([1, 2], confidence="0.95"), "confidence '0.95'"),
        (lambda: intervals.bootstrap_interval([1, 2], resamples=0), "resamples 0"),
        (lambda: intervals.bootstrap_interval([1, 2], seed=-1), "seed -1"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
