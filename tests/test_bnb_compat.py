"""bitsandbytes' bytes of double-quantized scales, and its tensors read without it."""

import platform
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_parity import DTYPES, assert_same_bytes, assert_same_values, bits, reference

from qlora_lab import bnb_compat
from qlora_lab.blockwise import dequantize_4bit, quantize_4bit
from qlora_lab.bnb_compat import from_quant_state, quantize_4bit_bnb, quantize_absmax_bnb
from qlora_lab.codebooks import dynamic_map, midpoints
from qlora_lab.double_quant import center, dequantize_absmax, quantize_absmax
from qlora_lab.errors import InputError

x86_only = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="the rounding table's arithmetic is that of x86; elsewhere a byte may differ",
)


def scales(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 64, generator=generator).abs().amax(dim=1)


def assert_same_scales(absmax: torch.Tensor) -> None:
    theirs, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    ours = quantize_absmax_bnb(absmax)
    assert torch.equal(ours.codes, theirs)
    assert torch.equal(bits(ours.absmax2), bits(state.absmax))
    restored = bnb.dequantize_blockwise(theirs, state) + absmax.mean()
    assert torch.equal(dequantize_absmax(ours), restored)


@x86_only
def test_a_million_scales():
    assert_same_scales(scales(1_000_001))


@x86_only
@given(st.integers(1, 2000), st.floats(-40, 34), st.integers(0, 2**32))
def test_any_length_and_magnitude(count, exponent, seed):
    # Up to 2,000 scales of at most 10 times 1e34: their sum, and so the mean, stays finite.
    assert_same_scales(scales(count, seed) * 10.0**exponent)


@x86_only
def test_scales_whose_sum_overflows_are_refused_where_bitsandbytes_loses_them():
    absmax = scales(129, seed=1) * 1e36
    assert torch.isfinite(absmax).all() and torch.isinf(absmax.sum())
    theirs, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert not torch.isfinite(bnb.dequantize_blockwise(theirs, state) + absmax.mean()).any()
    with pytest.raises(InputError, match="overflows"):
        quantize_absmax_bnb(absmax)


@x86_only
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1e-38, 1e38])
def test_subnormal_scales(value):
    assert_same_scales(torch.tensor([value, 0.0, value / 2, value]))


def test_a_block_of_zeros_is_byte_zero():
    assert quantize_absmax_bnb(torch.tensor([3.0])).codes.tolist() == [0]
    assert dequantize_absmax(quantize_absmax_bnb(torch.tensor([3.0]))).tolist() == [3.0]


@x86_only
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (333, 77), (5,), (4096,), (2, 3, 129)], ids=str)
def test_a_weight_with_double_quantization(shape, dtype, quant_type):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = reference(weight, 64, quant_type, double=True)
    ours = quantize_4bit_bnb(weight, 64, quant_type)
    assert_same_bytes(ours, packed, state)
    assert_same_values(ours, packed, state)


@x86_only
def test_bitsandbytes_does_not_round_to_the_nearest():
    """Fault 5: its CPU kernel takes a code next to the nearest one for one scale in 600.

    The guard is `double_quant.quantize_absmax`, which never does.
    """
    absmax = scales(300_000)
    _, blocks, absmax2 = center(absmax)
    scaled = (blocks / absmax2).view(-1)[: len(absmax)].double()
    borders = torch.tensor(midpoints(dynamic_map()), dtype=torch.float64)
    nearest = torch.bucketize(scaled, borders)
    theirs, _ = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(quantize_absmax(absmax).codes.long(), nearest)
    wrong = (theirs.long() != nearest).float().mean().item()
    assert 0.0005 < wrong < 0.005
    assert ((quantize_absmax_bnb(absmax).codes.long() != nearest).float().mean()) == wrong


def test_the_table_is_never_more_than_four_codes_off():
    """A bound on all values, not on a sample: a point answers for half a step to either side."""
    table = bnb_compat._rounding_table(torch.device("cpu")).long()
    points = torch.linspace(-1, 1, bnb_compat.POINTS, dtype=torch.float64)
    half_step = 1 / (bnb_compat.POINTS - 1)
    borders = torch.tensor(midpoints(dynamic_map()), dtype=torch.float64)
    lowest = torch.bucketize(points - half_step, borders)
    highest = torch.bucketize(points + half_step, borders)
    assert max((table - lowest).max(), (highest - table).max()) == 4


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_reading_a_quant_state(quant_type, double):
    weight = torch.randn(30, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, state = reference(weight, 64, quant_type, double)
    read = from_quant_state(packed[:, None], state)
    assert read.packed.data_ptr() == packed.data_ptr()  # a view
    assert (read.shape, read.dtype, read.codebook) == (weight.shape, weight.dtype, quant_type)
    assert_same_values(read, packed, state)
    if not double:
        assert torch.equal(
            dequantize_4bit(read), dequantize_4bit(quantize_4bit(weight, 64, quant_type))
        )


def state_with(**changes):
    state = reference(torch.ones(4, 64))[1]
    fields = dict(
        absmax=state.absmax,
        shape=state.shape,
        dtype=state.dtype,
        blocksize=64,
        quant_type="nf4",
        code=state.code,
        nested=False,
    )
    return SimpleNamespace(**fields | changes)


@pytest.mark.parametrize(
    "packed, changes, words",
    [
        (torch.zeros(128), {}, "packed weights are torch.float32"),
        (torch.zeros(64, dtype=torch.uint8), {}, "64 bytes do not hold the 256 codes"),
        (torch.zeros(128, dtype=torch.uint8), {"quant_type": "int8"}, "only nf4 and fp4"),
        (torch.zeros(128, dtype=torch.uint8), {"code": torch.zeros(16)}, "not the nf4 known here"),
    ],
)
def test_bad_input_is_one_line(packed, changes, words):
    with pytest.raises(InputError, match=words) as caught:
        from_quant_state(packed, state_with(**changes))
    assert "\n" not in str(caught.value)
