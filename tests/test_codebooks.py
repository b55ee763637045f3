"""Codebooks against bitsandbytes' tables, bit for bit, and against what the texts say of them."""

import itertools
import math
import statistics
import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type

from qlora_lab import codebooks
from qlora_lab.codebooks import (
    codebook,
    dynamic_map,
    fp4,
    int_codebook,
    l1_optimal,
    midpoints,
    nf4,
    normal_float,
    paper_eq4,
)
from qlora_lab.errors import InputError


def float32(values) -> list[float]:
    return torch.tensor(values, dtype=torch.float32).tolist()


def mean_error(values, blocksize: int, blocks: int = 2**21) -> float:
    weight = torch.randn(blocks // blocksize, blocksize, generator=torch.Generator().manual_seed(0))
    absmax = weight.abs().amax(1, keepdim=True)
    table = torch.tensor(sorted(values))
    codes = torch.bucketize(weight / absmax, torch.tensor(midpoints(tuple(values))))
    return (table[codes] * absmax - weight).abs().mean().item()


def test_nf4_is_bitsandbytes_table_bit_for_bit():
    assert nf4() == tuple(get_4bit_type("nf4", device="cpu").tolist())


def test_nf4_has_eight_positive_seven_negative_values_and_a_zero():
    assert [sum(v > 0 for v in nf4()), sum(v < 0 for v in nf4()), nf4()[7]] == [8, 7, 0.0]
    assert (nf4()[0], nf4()[-1]) == (-1.0, 1.0)


def test_nf4_needs_32_bit_arithmetic():
    """The same recipe in 64 bits misses the table, though by little: hence the rounding."""
    ppf = statistics.NormalDist().inv_cdf
    side = [ppf(0.9677083 + (0.5 - 0.9677083) * i / 8) for i in range(8)]
    worst = max(abs(a / side[0] - b) for a, b in zip(side, reversed(nf4()), strict=False))
    assert 1e-9 < worst < 2e-7


@pytest.mark.parametrize("end, steps", [(0.9677083, range(2, 130)), (0.1, range(2, 130))])
def test_linspace_is_torchs(end, steps):
    start, stop = (end, 0.5) if end > 0.5 else (end, 1.0)
    for n in steps:
        assert codebooks._linspace_f32(start, stop, n) == torch.linspace(start, stop, n).tolist()


def test_equation_4_starts_at_minus_infinity_and_is_symmetric_without_it():
    first, *rest = paper_eq4()
    assert first == -math.inf
    assert len(rest) == 15 and rest[7] == 0
    assert rest == pytest.approx([-v for v in reversed(rest)], abs=1e-12)
    quantile = statistics.NormalDist().inv_cdf
    assert rest[-1] == pytest.approx((quantile(15 / 17) + quantile(16 / 17)) / 2)


def test_equation_4_is_not_what_the_code_does():
    scaled = [v / paper_eq4()[-1] for v in paper_eq4()[1:]]
    assert max(abs(a - b) for a, b in zip(scaled, nf4()[1:], strict=True)) > 0.02


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_counts(bits):
    values = normal_float(bits)
    assert len(set(values)) == 2**bits
    assert list(values) == sorted(values)
    assert sum(v > 0 for v in values) == 2 ** (bits - 1)
    assert (values[0], values[-1]) == (-1.0, 1.0) and 0.0 in values
    assert float32(values) == list(values)


def test_integers():
    assert int_codebook(2) == (-1.0, 0.0, 1.0)
    assert int_codebook(2, symmetric=False) == (-1.0, -0.5, 0.0, 0.5)
    assert len(int_codebook(4)) == 15 and len(int_codebook(4, symmetric=False)) == 16
    gaps = {round(b - a, 6) for a, b in itertools.pairwise(int_codebook(4))}
    assert gaps == {round(1 / 7, 6)}


def test_fp4_is_in_bitsandbytes_code_order():
    assert fp4() == tuple(get_4bit_type("fp4", device="cpu").tolist())
    assert len(set(fp4())) == 15
    assert [-v for v in fp4()[:8]] == list(fp4()[8:])


def test_dynamic_map_is_bitsandbytes_bit_for_bit():
    assert dynamic_map() == tuple(create_dynamic_map().tolist())


def test_dynamic_map_ends_and_zero():
    values = dynamic_map()
    assert len(set(values)) == 256 and list(values) == sorted(values)
    assert (round(values[0], 5), values[-1], values[127]) == (-0.99297, 1.0, 0.0)


@pytest.mark.parametrize("blocksize, ours, theirs", [(64, 0.07281, 0.0728), (4096, 0.0839, 0.0928)])
def test_l1_optimal_ties_nf4_at_64_and_wins_at_4096(blocksize, ours, theirs):
    values = l1_optimal(blocksize)
    assert mean_error(values, blocksize) == pytest.approx(ours, rel=0.005)
    assert mean_error(nf4(), blocksize) == pytest.approx(theirs, rel=0.005)
    assert mean_error(values, blocksize) < mean_error(nf4(), blocksize)


@pytest.mark.parametrize("blocksize, bits", [(2, 4), (32, 2), (64, 3), (64, 4), (4096, 5)])
def test_l1_optimal_keeps_the_ends_and_zero(blocksize, bits):
    values = l1_optimal(blocksize, bits)
    assert len(set(values)) == 2**bits and list(values) == sorted(values)
    assert (values[0], values[2 ** (bits - 1) - 1], values[-1]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize("index", [1, 5, 8, 14])
def test_moving_any_value_of_l1_optimal_makes_it_worse(index):
    values = list(l1_optimal(256))
    best = mean_error(values, 256)
    for step in (-0.01, 0.01):
        moved = [v + step * (i == index) for i, v in enumerate(values)]
        assert mean_error(moved, 256) > best


def test_codebook_by_name():
    assert codebook("nf4") == nf4() and codebook("fp4") == fp4()
    assert codebook("nf3") == normal_float(3) and codebook("int8") == int_codebook(8)
    assert codebook("int4-asym") == int_codebook(4, symmetric=False)


def test_midpoints_are_32_bit_floats_between_sorted_neighbours():
    borders = midpoints(nf4())
    table = torch.tensor(nf4())
    assert list(borders) == ((table[1:] + table[:-1]) / 2).tolist()
    assert list(midpoints(fp4())) == sorted(midpoints(fp4()))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: normal_float(1), "bits 1 is not possible; give a whole number from 2 to 8"),
        (lambda: normal_float(9), "2 to 8"),
        (lambda: paper_eq4(0), "2 to 8"),
        (lambda: int_codebook(16), "2 to 8"),
        (lambda: l1_optimal(1), "blocksize=1"),
        (lambda: l1_optimal(64, 1), "2 to 8"),
        (lambda: codebook("nf16"), "'nf16' is not known"),
        (lambda: codebook("int4-sym"), "is not known"),
        (lambda: codebook("NF4"), "'NF4' is not known: use nf2..nf8, .* in small letters"),
        (lambda: codebook(["nf4"]), "is not known"),
        (lambda: normal_float("4"), "bits '4' is not possible"),
        (lambda: normal_float(4.0), "bits 4.0 is not possible"),
        (lambda: l1_optimal(48), "blocksize=48: .* power of two from 2 to 4096, because"),
        (lambda: l1_optimal([64]), "power of two"),
        (lambda: l1_optimal(64.0), "power of two"),
        (lambda: midpoints("nf4"), "codebook of 'nf4' is not possible; give two or more numbers"),
        (lambda: midpoints(3), "two or more numbers"),
        (lambda: midpoints([1.0]), "two or more numbers"),
        (lambda: midpoints([0.0, float("nan")]), "none of them NaN"),
        (lambda: midpoints(range(257)), "257 values: at most 256"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_module_needs_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import qlora_lab.codebooks as c; c.nf4(); "
        "new = {n.split('.')[0] for n in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'qlora_lab'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
