"""How sure is it: how much of a number, or of a difference, is luck in the choice of rows.

`bootstrap_interval` draws the test rows again, many times; `paired_difference` does so for two
methods that answered the same rows. Resampling needs no formula for the metric: it serves shares
of right answers and ratios such as bits per byte alike. The intervals speak of *these rows drawn
again*, not of another training seed, which has to be trained again.

Source: Efron, "Bootstrap methods: another look at the jackknife" (1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np

from qlora_lab.errors import InputError, shown, whole


def bootstrap_interval(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Estimate a mean and how far luck in the choice of rows may have moved it.

    Args:
        values: One value a row: right or wrong (n,), or bits of each text with its bytes as weight.
        weights: What each value is divided by, for ratios such as bits per byte; 1 by default.
        confidence: Share of resamples inside the interval.
        resamples: How often n rows are drawn with replacement.
        seed: Same seed, same interval.

    Returns:
        sum(values) / sum(weights), and the lower and upper end of its percentile interval.

    Raises:
        InputError: If there are no values, one is no finite number, the lengths differ, a weight is
            not above 0, the confidence is not in (0, 1), or there are no resamples.

    Source:
        Efron, "Bootstrap methods: another look at the jackknife" (1979), percentile interval.
    """
    top = _finite("values", values)
    bottom = np.ones_like(top) if weights is None else _finite("weights", weights)
    if top.ndim != 1 or top.size == 0 or top.shape != bottom.shape:
        raise InputError(
            f"values {top.shape} and weights {bottom.shape} must be equally long lists"
        )
    if not (bottom > 0).all():
        raise InputError("a weight is 0 or less: give what each value is divided by, its bytes")
    if not isinstance(confidence, Real) or not 0 < confidence < 1:
        raise InputError(
            f"confidence {shown(confidence)} is not between 0 and 1; use 0.95 for 95 %"
        )
    whole("resamples", resamples)
    whole("seed", seed, 0)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, top.size, size=(resamples, top.size))
    means = top[rows].sum(axis=1) / bottom[rows].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(top.sum() / bottom.sum()), float(low), float(high)


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    """Return the values as an array of finite numbers."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} {shown(values)} are not possible; give a list of numbers"
        ) from None
    if not np.isfinite(array).all():
        raise InputError(
            f"{name} hold NaN or infinity: no mean of them is a number; leave them out"
        )
    return array


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Estimate by how much `second` is above `first` on the same rows.

    Both methods met the same easy and hard rows. Resampling the rows' differences takes that
    common luck out, so the interval is narrower than two separate ones would suggest.

    Args:
        first: One value a row.
        second: One value for each of the same rows.
        weights: As in `bootstrap_interval`.
        confidence: As in `bootstrap_interval`.
        resamples: As in `bootstrap_interval`.
        seed: As in `bootstrap_interval`.

    Returns:
        The difference second - first, and its interval.

    Raises:
        InputError: If the rows are not the same in number; and as `bootstrap_interval` says.
    """
    before, after = _finite("first", first), _finite("second", second)
    if before.shape != after.shape or before.ndim != 1:
        raise InputError(f"{before.shape} and {after.shape} rows are not pairs; use the same rows")
    return bootstrap_interval(after - before, weights, confidence, resamples, seed)
