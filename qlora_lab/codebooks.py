"""Codebooks: the short lists of values that a low-bit weight may take.

Quantizing to k bits means picking at most 2**k numbers between -1 and 1 and replacing every
scaled weight by the nearest of them. All that tells NF4 from int4 or FP4 is which numbers are on
the list; this module builds the lists, `blockwise` uses them.

How NF4 comes about:

1. Weights look roughly normal, so put the values at quantiles of a normal distribution: about as
   many weights fall between two neighbours everywhere.
2. The outermost quantiles are infinite, so stop short of them, at probability 0.9677.
3. Zero must be on the list (padding and pruned weights are exactly zero) and sixteen is an even
   number, so one side gets one value more: eight positive, seven negative.
4. Divide by the largest, so that the list spans -1 to 1, the range that scaling a block by its
   largest magnitude leaves.

The choice made here: everything is computed with the standard library, rounding to 32-bit floats
exactly where bitsandbytes does. `statistics.NormalDist` stands in for scipy. Plain 64-bit
arithmetic would be two lines shorter and differ from the shipped NF4 table in the last bit,
enough to turn an occasional weight at a midpoint into another code.

All functions return tuples of Python floats. They ascend, except `fp4`, whose order is its code.
"""

import itertools
import math
import struct
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from numbers import Integral
from statistics import NormalDist

from qlora_lab.errors import InputError, shown, whole

_NORMAL = NormalDist()
_BITS = range(2, 9)
_FITTED = tuple(2**n for n in range(1, 13))  # block sizes that a codebook can be fitted to


def _f32(value: float) -> float:
    """Round to the nearest 32-bit float."""
    return struct.unpack("f", struct.pack("f", value))[0]


def _linspace_f32(start: float, end: float, steps: int) -> list[float]:
    """Evenly spaced 32-bit floats, the same bits as `torch.linspace`.

    torch counts up from `start` in the first half and down from `end` in the second; each sum is
    rounded once. Python's 64-bit floats hold the unrounded sum exactly.
    """
    start, end = _f32(start), _f32(end)
    step = _f32(_f32(end - start) / (steps - 1))
    half = steps // 2
    return [
        _f32(start + step * i) if i < half else _f32(end - step * (steps - 1 - i))
        for i in range(steps)
    ]


def _check_bits(bits: int) -> None:
    whole("bits", bits, _BITS[0], _BITS[-1])


def numbers(values: Iterable[float], most: int = 256) -> tuple[float, ...]:
    """Return a codebook's values, refusing what is no list of 2 to `most` numbers.

    Args:
        values: The values, in any order.
        most: How many are allowed; 256 is what fits a byte.

    Raises:
        InputError: One is no number or NaN, or there are too few or too many.
    """
    try:
        if isinstance(values, str):
            raise TypeError
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise InputError(
            f"a codebook of {shown(values)} is not possible; give two or more numbers, as nf4() has"
        ) from None
    if len(found) < 2 or any(map(math.isnan, found)):
        raise InputError("codebook values must be two or more numbers, none of them NaN")
    if len(found) > most:
        raise InputError(f"the codebook has {len(found)} values: at most {most} fit here")
    return found


def normal_float(bits: int = 4) -> tuple[float, ...]:
    """Build the NormalFloat codebook of `bits` bits from quantiles of a normal distribution.

    Args:
        bits: Width of a code, 2 to 8.

    Returns:
        `2**bits` ascending values from -1 to 1 with an exact 0: `2**(bits-1)` positive ones and
        one fewer negative ones.

    Raises:
        InputError: If `bits` is outside 2..8.

    Source:
        Dettmers et al., "QLoRA", section 3, the prose after equation 4; for 4 bits
        `bitsandbytes.functional.create_normal_map`.
    """
    _check_bits(bits)
    half = 2 ** (bits - 1)
    # The outermost slice is half a step wide on either side. One side has 2**bits - 1 steps, the
    # other 2**bits, and the end is put at the mean of the two half-steps: 0.9677083 at 4 bits.
    # Seven digits are what bitsandbytes' authors kept; the eighth would move the table's last bits.
    end = round(1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2, 7)
    positive = [_NORMAL.inv_cdf(p) for p in _linspace_f32(end, 0.5, half + 1)[:-1]]
    negative = [-_NORMAL.inv_cdf(p) for p in _linspace_f32(end, 0.5, half)[:-1]]
    values = [_f32(v) for v in sorted([*negative, 0.0, *positive])]
    return tuple(_f32(v / values[-1]) for v in values)


def nf4() -> tuple[float, ...]:
    """Build NF4, the sixteen values of QLoRA, equal to bitsandbytes' table bit for bit.

    Returns:
        16 ascending values, -1.0 to 1.0, index 7 is 0.0. The index is the 4-bit code.

    Source:
        Dettmers et al., "QLoRA", section 3 and appendix E; `bitsandbytes.functional.get_4bit_type`.
    """
    return normal_float(4)


def paper_eq4(bits: int = 4) -> tuple[float, ...]:
    """Read equation 4 of the QLoRA paper literally, infinity included.

    `q_i = (Q(i / (2**k + 1)) + Q((i + 1) / (2**k + 1))) / 2` for i = 0 .. 2**k - 1, where Q is the
    quantile function of N(0, 1). `Q(0)` is minus infinity, hence `q_0` too; the other
    `2**k - 1` values are symmetric about 0, which is not what the paper's prose, or its table, has.

    Args:
        bits: Width of a code, 2 to 8.

    Returns:
        `2**bits` ascending values in units of sigma (not scaled to [-1, 1]); the first is -inf.

    Raises:
        InputError: If `bits` is outside 2..8.

    Source:
        Dettmers et al., "QLoRA", equation 4.
    """
    _check_bits(bits)
    slices = 2**bits + 1
    quantiles = [-math.inf, *(_NORMAL.inv_cdf(i / slices) for i in range(1, slices))]
    return tuple((low + high) / 2 for low, high in itertools.pairwise(quantiles))


def int_codebook(bits: int = 4, symmetric: bool = True) -> tuple[float, ...]:
    """Build evenly spaced values: what an integer with a scale can represent.

    Args:
        bits: Width of a code, 2 to 8.
        symmetric: If true, -7..7 divided by 7 (at 4 bits), which leaves one code unused; otherwise
            all codes -8..7 divided by 8, which cannot represent +1, so that a block whose largest
            weight is positive clips it. (Quantizers with a zero point, often called asymmetric as
            well, store a second number per block and are not codebooks.)

    Returns:
        `2**bits - 1` (symmetric) or `2**bits` ascending values within [-1, 1].

    Raises:
        InputError: If `bits` is outside 2..8.
    """
    _check_bits(bits)
    top = 2 ** (bits - 1) - 1
    low, scale = (-top, top) if symmetric else (-top - 1, top + 1)
    return tuple(_f32(i / scale) for i in range(low, top + 1))


def fp4() -> tuple[float, ...]:
    """Build FP4 (1 sign, 2 exponent, 1 mantissa bit), **in code order**, not ascending.

    The position in the tuple is the 4-bit code, as bitsandbytes stores it: codes 8 to 15 are the
    negatives of codes 0 to 7. Zero appears twice (codes 0 and 8), so there are 15 distinct values.

    Returns:
        16 values within [-1, 1] in the order of their codes.

    Source:
        `bitsandbytes.functional.get_4bit_type("fp4")`.
    """
    positive = [_f32(v / 12) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
    return (*positive, *(-v if v else 0.0 for v in positive))


def dynamic_map() -> tuple[float, ...]:
    """Build the signed dynamic 8-bit map, which holds double quantization's scales.

    Seven decades, 1e-7 to 1, and in each decade twice as many evenly spaced values as in the one
    below: fine near 1, coarse near 0. The paper calls its scales FP8; this is not E4M3.

    Returns:
        256 ascending values from -0.99297 to 1.0, with an exact 0; equal to bitsandbytes' map bit
        for bit.

    Source:
        Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", section 3;
        `bitsandbytes.functional.create_dynamic_map`.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = _linspace_f32(0.1, 1.0, 2**decade + 1)
        power = _f32(10.0 ** (decade - 6))
        for low, high in itertools.pairwise(edges):
            value = _f32(power * _f32(_f32(low + high) / 2))
            values += [value, -value]
    return tuple(sorted(values))


def l1_optimal(blocksize: int, bits: int = 4) -> tuple[float, ...]:
    """Fit the codebook with the least mean absolute error on normal weights at one block size.

    After division by the block's largest magnitude weights are no longer normal: a larger block
    has a larger maximum, so the rest crowds closer to zero. This codebook follows that: -1, 0 and
    1 stay fixed, and each other value is moved to the (weighted) median of the weights nearest to
    it until nothing moves: Lloyd's algorithm with medians.

    Args:
        blocksize: Weights per block, a power of two from 2 to 4096.
        bits: Width of a code, 2 to 8.

    Returns:
        `2**bits` ascending values from -1 to 1 with an exact 0, one more positive than negative.

    Raises:
        InputError: If `blocksize` is no power of two from 2 to 4096, or `bits` outside 2..8.

    Source:
        Yoshida, "NF4 Isn't Information Theoretically Optimal (and that's Good)", section 4.
    """
    _check_bits(bits)
    if not isinstance(blocksize, Integral) or blocksize not in _FITTED:
        raise InputError(
            f"blocksize={shown(blocksize)}: a codebook is fitted to a power of two from 2 to 4096, "
            "because weights are quantized in no other blocks"
        )
    return _l1_optimal(int(blocksize), int(bits))


@lru_cache(maxsize=32)
def _l1_optimal(blocksize: int, bits: int) -> tuple[float, ...]:
    mass = _scaled_weight_mass(blocksize)
    half = 2 ** (bits - 1)
    positive = _lloyd_medians(half - 1, mass)
    negative = _lloyd_medians(half - 2, mass)
    ascending = [-1.0, *(-v for v in reversed(negative)), 0.0, *positive, 1.0]
    return tuple(_f32(v) for v in ascending)


def _scaled_weight_mass(blocksize: int, cells: int = 1000) -> list[float]:
    """Cumulate over x in [0, 1] the error weight of normal weights scaled by their block's absmax.

    If the block's maximum is m, its other weights are normal, cut at m. An error of 0.01 after
    scaling costs 0.01 * m, hence the factor m. Returned at x = 0, 1/cells, ..., 1.
    """
    total = [0.0] * (cells + 1)
    for step in range(1, 400):
        m = step * 0.02  # maxima of 0 to 8 sigma; the density below is smooth at this width
        inside = math.erf(m / math.sqrt(2))  # P(|weight| < m)
        density = blocksize * inside ** (blocksize - 1) * math.exp(-m * m / 2)
        if density < 1e-12:
            continue
        for i in range(cells + 1):
            total[i] += density * m * math.erf(i / cells * m / math.sqrt(2)) / inside
    return total


def _lloyd_medians(count: int, mass: list[float]) -> list[float]:
    """Place `count` values between a fixed 0 and a fixed 1 at the medians of their own cells."""
    cells = len(mass) - 1

    def mass_below(x: float) -> float:
        i = min(int(x * cells), cells - 1)
        return mass[i] + (x * cells - i) * (mass[i + 1] - mass[i])

    def where_mass_is(target: float) -> float:
        i = min(max(bisect_right(mass, target) - 1, 0), cells - 1)
        return (i + (target - mass[i]) / (mass[i + 1] - mass[i])) / cells

    values = [(i + 1) / (count + 1) for i in range(count)]
    for _ in range(2000):
        fenced = [0.0, *values, 1.0]
        edges = [mass_below((low + high) / 2) for low, high in itertools.pairwise(fenced)]
        moved = [where_mass_is((low + high) / 2) for low, high in itertools.pairwise(edges)]
        shift = max((abs(a - b) for a, b in zip(values, moved, strict=True)), default=0.0)
        values = moved
        if shift < 1e-9:
            break
    return values


def codebook(name: str) -> tuple[float, ...]:
    """Look a codebook up by name.

    Args:
        name: "nf4" (or "nf2" to "nf8"), "int4" ("int2" to "int8"), "int4-asym" (likewise), "fp4".

    Returns:
        The codebook's values within [-1, 1], ascending; for "fp4" in code order.

    Raises:
        InputError: If the name is not one of these.
    """
    found = _named(name) if isinstance(name, str) else None
    if found is None:
        raise InputError(
            f"codebook {shown(name)} is not known: use nf2..nf8, int2..int8, int2-asym..int8-asym "
            "or fp4, in small letters"
        )
    return found


@lru_cache(maxsize=64)
def _named(name: str) -> tuple[float, ...] | None:
    if name == "fp4":
        return fp4()
    for bits in _BITS:
        if name == f"nf{bits}":
            return normal_float(bits)
        if name == f"int{bits}":
            return int_codebook(bits)
        if name == f"int{bits}-asym":
            return int_codebook(bits, symmetric=False)
    return None


def midpoints(values: tuple[float, ...]) -> tuple[float, ...]:
    """Compute the borders between neighbouring values, as 32-bit floats.

    A scaled weight takes the code of the interval it falls in; exactly on a border it takes the
    lower value.

    Args:
        values: A codebook in any order.

    Returns:
        `len(values) - 1` ascending borders between the sorted values.

    Raises:
        InputError: If these are not 2 to 256 numbers.
    """
    return _midpoints(numbers(values))


@lru_cache(maxsize=64)
def _midpoints(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(_f32(_f32(low + high) / 2) for low, high in itertools.pairwise(sorted(values)))
