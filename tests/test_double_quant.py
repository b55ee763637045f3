"""Double quantization: to the nearest code, and how far that is from bitsandbytes' bytes."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_parity import bits

from qlora_lab.blockwise import dequantize_4bit, quantize_4bit
from qlora_lab.codebooks import dynamic_map, midpoints
from qlora_lab.double_quant import center, dequantize_absmax, quantize_absmax
from qlora_lab.errors import InputError


def scales(count: int, seed: int = 0) -> torch.Tensor:
    """Scales of blocks of 64 normal weights."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 64, generator=generator).abs().amax(dim=1)


def test_close_to_bitsandbytes():
    """99.5 % of bytes equal, none more than four codes away, each a near tie."""
    absmax = scales(300_000)
    ours = quantize_absmax(absmax)
    theirs, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(bits(ours.absmax2), bits(state.absmax))
    assert torch.equal(bits(ours.offset), bits(absmax.mean()))
    differ = ours.codes != theirs
    assert differ.float().mean() < 0.005
    assert (ours.codes.int() - theirs.int()).abs().max() <= 4
    _, blocks, absmax2 = center(absmax)
    scaled = (blocks / absmax2).view(-1)[: len(absmax)][differ]
    distance = (scaled[:, None] - torch.tensor(midpoints(dynamic_map()))).abs().amin(dim=1)
    assert distance.max() < 1.6e-5


def test_every_code_is_the_nearest():
    absmax = scales(3000)
    _, blocks, absmax2 = center(absmax)
    scaled = (blocks / absmax2).view(-1)[:3000]
    nearest = (scaled[:, None] - torch.tensor(dynamic_map())).abs().amin(dim=1)
    chosen = (scaled - torch.tensor(dynamic_map())[quantize_absmax(absmax).codes.long()]).abs()
    assert (chosen - nearest).max() < 1e-7


@given(
    count=st.integers(1, 700),
    blocksize=st.sampled_from([1, 7, 256]),
    exponent=st.integers(-40, 30),
    seed=st.integers(0, 2**32),
)
def test_restored_scales_are_close(count, blocksize, exponent, seed):
    absmax = scales(count, seed) * 10.0**exponent
    quantized = quantize_absmax(absmax, blocksize)
    restored = dequantize_absmax(quantized)
    assert restored.shape == absmax.shape and restored.dtype == torch.float32
    assert len(quantized.codes) == count and len(quantized.absmax2) == -(-count // blocksize)
    # the widest gap of the map is below 1/64 of a block's largest: half of it, and rounding
    bound = quantized.absmax2.repeat_interleave(blocksize)[:count] / 120 + 1e-6 * absmax.max()
    assert ((restored - absmax).abs() <= bound + 1e-44).all()


def test_a_single_scale_comes_back_exactly():
    """Less its mean it is zero: 0/0, which must not become NaN."""
    for value in (3.0, 1e-38, 0.0, 1e-44):
        quantized = quantize_absmax(torch.tensor([value]))
        assert dequantize_absmax(quantized).tolist() == [torch.tensor(value).item()]


def test_equal_scales_come_back_exactly():
    assert dequantize_absmax(quantize_absmax(torch.full((1000,), 2.0))).unique().tolist() == [2.0]


def test_what_it_saves_and_what_it_costs():
    weight = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    plain, double = quantize_4bit(weight), quantize_4bit(weight, double_quant=True)
    assert plain.bits_per_weight == 4.5
    assert double.bits_per_weight == pytest.approx(4.126953, abs=1e-5)
    error = [(dequantize_4bit(q) - weight).abs().mean().item() for q in (plain, double)]
    assert error == pytest.approx([0.07280, 0.07288], abs=1e-4)
    assert 1.0003 < error[1] / error[0] < 1.003


def test_to():
    moved = quantize_absmax(scales(300)).to("meta")
    assert {t.device.type for t in (moved.codes, moved.absmax2, moved.offset)} == {"meta"}
    assert moved.nbytes == 300 + 2 * 4 + 4


@pytest.mark.parametrize(
    "absmax, blocksize, words",
    [
        (torch.zeros(0), 256, r"shape \(0,\): it must be a non-empty vector"),
        (torch.zeros(2, 2), 256, "non-empty vector"),
        (torch.tensor([1.0, float("nan")]), 256, "NaN or infinity"),
        (torch.tensor([3e38, 3e38]), 256, "overflows"),
        ([1.0, 2.0], 256, "absmax .* give a torch tensor"),
        (torch.ones(3).double(), 256, "absmax is torch.float64: scales are float32"),
        (torch.ones(3), "256", "blocksize '256'"),
        (torch.ones(3), 1.5, "blocksize 1.5"),
        (torch.ones(3), 0, "blocksize 0 is not possible; give a whole number from 1 on"),
    ],
)
def test_bad_input_is_one_line(absmax, blocksize, words):
    with pytest.raises(InputError, match=words) as caught:
        quantize_absmax(absmax, blocksize)
    assert "\n" not in str(caught.value)


def test_only_quantized_scales_are_restored():
    with pytest.raises(InputError, match="of type Tensor is no QuantizedAbsmax"):
        dequantize_absmax(torch.ones(3))
