"""The proof is proven: each corruption makes the parity tests' own comparison fail.

Every test damages one thing, in the result or in the code, and hands it to the very function that
`test_blockwise` and `test_bnb_compat` use; if that accepted it, parity would prove nothing.
"""

from dataclasses import replace

import pytest
import torch
from quant_parity import (
    assert_parity,
    assert_same_bytes,
    assert_same_values,
    on_the_borders,
    reference,
)

from qlora_lab import blockwise, codebooks
from qlora_lab.blockwise import dequantize_4bit, quantize_4bit, quantize_codes
from qlora_lab.bnb_compat import quantize_4bit_bnb
from qlora_lab.codebooks import l1_optimal
from qlora_lab.double_quant import quantize_absmax

WEIGHT = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))


def assert_corruption_fails(corrupted, packed, state) -> None:
    with pytest.raises(AssertionError):
        assert_same_bytes(corrupted, packed, state)
    with pytest.raises(AssertionError):
        assert_same_values(corrupted, packed, state)


def test_the_uncorrupted_weight_is_accepted():
    assert_parity(WEIGHT)
    for blocksize in (64, 128):
        assert_parity(on_the_borders(blocksize, ragged=17), blocksize)


# --- the result corrupted


@pytest.mark.parametrize("half", [0x01, 0x10], ids=["low", "high"])
def test_one_changed_nibble_fails(half):
    quantized = quantize_4bit(WEIGHT)
    damaged = quantized.packed.clone()
    damaged[1234] ^= half
    assert_corruption_fails(replace(quantized, packed=damaged), *reference(WEIGHT))


def test_one_changed_scale_fails():
    """By one unit in the last place."""
    quantized = quantize_4bit(WEIGHT)
    damaged = quantized.absmax.clone()
    damaged[77] = damaged[77].nextafter(torch.tensor(9.0))
    assert_corruption_fails(replace(quantized, absmax=damaged), *reference(WEIGHT))


def test_one_changed_sign_fails():
    weight = WEIGHT.clone()
    weight[100, 30] *= -1
    assert_corruption_fails(quantize_4bit(weight), *reference(WEIGHT))


def test_the_sign_of_one_scale_fails():
    quantized = quantize_4bit(WEIGHT)
    damaged = quantized.absmax.clone()
    damaged[3] *= -1
    assert_corruption_fails(replace(quantized, absmax=damaged), *reference(WEIGHT))


def test_the_sign_of_one_codebook_value_fails():
    quantized = quantize_4bit(WEIGHT)
    values = list(quantized.values)
    values[8] *= -1
    with pytest.raises(AssertionError):
        assert_same_values(replace(quantized, codebook=tuple(values)), *reference(WEIGHT))


@pytest.mark.parametrize("part", ["codes", "absmax2", "offset"])
def test_one_changed_number_of_double_quantization_fails(part):
    quantized = quantize_4bit_bnb(WEIGHT)
    tensors = quantized.absmax
    damaged = getattr(tensors, part).clone()
    damaged.view(-1)[0] += 1
    corrupted = replace(quantized, absmax=replace(tensors, **{part: damaged}))
    assert_corruption_fails(corrupted, *reference(WEIGHT, double=True))


def test_leaving_out_double_quantization_fails():
    assert_corruption_fails(quantize_4bit(WEIGHT), *reference(WEIGHT, double=True))


def test_double_quantization_of_only_one_side_fails():
    assert_corruption_fails(quantize_4bit_bnb(WEIGHT), *reference(WEIGHT, double=False))


def test_leaving_out_the_mean_offset_fails():
    quantized = quantize_4bit_bnb(WEIGHT)
    shifted = replace(quantized.absmax, offset=quantized.absmax.offset * 0)
    assert_corruption_fails(replace(quantized, absmax=shifted), *reference(WEIGHT, double=True))


def test_rounding_scales_to_the_nearest_is_told_from_bitsandbytes_table():
    weight = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    quantized = quantize_4bit(weight)
    nearest = replace(quantized, absmax=quantize_absmax(quantized.absmax))
    packed, state = reference(weight, double=True)
    assert_same_bytes(quantize_4bit_bnb(weight), packed, state)
    assert_corruption_fails(nearest, packed, state)


# --- the code corrupted


def test_the_nibble_order_swapped_in_pack_fails(monkeypatch):
    right = blockwise.pack

    def swapped(codes, pad=7):
        packed = right(codes, pad)
        return packed << 4 | packed >> 4

    monkeypatch.setattr(blockwise, "pack", swapped)
    assert_corruption_fails(quantize_4bit(WEIGHT), *reference(WEIGHT))


def test_the_nibble_order_swapped_in_dequantize_fails(monkeypatch):
    right = blockwise._pairs
    # the two float32 of each 8-byte entry change places
    monkeypatch.setattr(
        blockwise,
        "_pairs",
        lambda values, device: (
            (right(values, device).view(torch.float32).view(-1, 2).flip(1).contiguous())
            .view(torch.int64)
            .view(-1)
        ),
    )
    with pytest.raises(AssertionError):
        assert_same_values(quantize_4bit(WEIGHT), *reference(WEIGHT))


def test_ties_going_up_fail(monkeypatch):
    right = torch.bucketize
    monkeypatch.setattr(torch, "bucketize", lambda *a, **k: right(*a, **k, right=True))
    ours = quantize_4bit(on_the_borders(64))
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_same_bytes(ours, *reference(on_the_borders(64)))


def test_dividing_the_full_blocks_fails(monkeypatch):
    """Multiplying by 1/absmax and dividing by absmax differ in the last bit, at midpoints."""

    def divided(flat, blocksize, values):
        blocks = flat.float().view(-1, blocksize)
        absmax = blocks.abs().amax(dim=1)
        borders = torch.tensor(codebooks.midpoints(values))
        codes = torch.bucketize(blocks / absmax[:, None], borders)
        return codes.view(-1).to(torch.uint8), absmax

    monkeypatch.setattr(blockwise, "quantize_codes", divided)
    with pytest.raises(AssertionError):
        assert_parity(on_the_borders(64))


def test_multiplying_the_ragged_block_fails(monkeypatch):
    def multiplied(flat, blocksize, values):
        """The ragged block filled up to a full one, and so multiplied by the reciprocal."""
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % blocksize))
        codes, absmax = quantize_codes(padded, blocksize, values)
        return codes[: len(flat)], absmax

    monkeypatch.setattr(blockwise, "quantize_codes", multiplied)
    with pytest.raises(AssertionError):
        for ragged in range(2, 4096, 64):
            assert_parity(on_the_borders(4096, ragged=ragged), 4096)


def test_blocks_along_rows_fail():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    rows = [quantize_4bit(row) for row in weight]
    by_rows = replace(
        quantize_4bit(weight),
        packed=torch.cat([row.packed for row in rows]),
        absmax=torch.cat([row.absmax for row in rows]),
    )
    assert_corruption_fails(by_rows, *reference(weight))


def test_leaving_out_the_smallest_scale_fails(monkeypatch):
    monkeypatch.setattr(blockwise, "TINY", 0.0)
    with pytest.raises((AssertionError, ValueError)):
        assert_parity(torch.cat([WEIGHT.view(-1), torch.zeros(70)]))


def test_another_padding_nibble_fails(monkeypatch):
    right = blockwise.pack
    monkeypatch.setattr(blockwise, "pack", lambda codes, pad: right(codes, 0))
    with pytest.raises(AssertionError):
        assert_parity(WEIGHT.view(-1)[:333])


def test_a_codebook_of_64_bit_floats_fails(monkeypatch):
    """The recipe without rounding to 32 bits on the way: the last bits of the table differ."""
    monkeypatch.setattr(codebooks, "_f32", float)
    codebooks._named.cache_clear()
    codebooks._midpoints.cache_clear()
    try:
        ours = quantize_4bit(WEIGHT)
        with pytest.raises(AssertionError):
            assert_same_values(ours, *reference(WEIGHT))
    finally:
        monkeypatch.undo()
        codebooks._named.cache_clear()
        codebooks._midpoints.cache_clear()


# --- the error is that of NF4: neither larger nor smaller

# bitsandbytes' own test means and standard deviations on randn(1024, 1024): |error|, and
# |error| / (|weight| + 1e-8), by block size.
BOUNDS = {
    32: (0.067746, 0.000069, 0.189726, 0.000304),
    64: (0.072798, 0.000074, 0.203339, 0.000340),
    128: (0.076831, 0.000091, 0.215237, 0.000391),
    256: (0.080337, 0.000102, 0.226105, 0.000398),
    512: (0.083547, 0.000143, 0.236079, 0.000544),
    1024: (0.086610, 0.000187, 0.245370, 0.000600),
    2048: (0.089592, 0.000251, 0.254163, 0.000747),
    4096: (0.092547, 0.000360, 0.262473, 0.000999),
}


def normal_weight(seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """The same (1024, 1024) on every device: a GPU's own generator draws others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1024, 1024, generator=generator).to(device)


def assert_error_in_bounds(
    blocksize: int,
    codebook="nf4",
    seed: int = 0,
    double=False,
    of: int | None = None,
    device: str = "cpu",
) -> None:
    """Both mean errors within seven standard deviations of bitsandbytes', on either side."""
    weight = normal_weight(seed, device)
    error = (dequantize_4bit(quantize_4bit(weight, blocksize, codebook, double)) - weight).abs()
    relative = (error / (weight.abs() + 1e-8)).mean()
    mean, deviation, relative_mean, relative_deviation = BOUNDS[of or blocksize]
    assert abs(error.mean() - mean) < 7 * deviation
    assert abs(relative - relative_mean) < 7 * relative_deviation


@pytest.mark.parametrize("blocksize", BOUNDS)
def test_the_error_is_bitsandbytes(blocksize, device):
    for seed in range(3):
        assert_error_in_bounds(blocksize, seed=seed, device=device)


def test_the_error_with_double_quantization_too(device):
    assert_error_in_bounds(64, double=True, device=device)


@pytest.mark.parametrize("blocksize, expected", [(64, 0.096543), (4096, 0.129536)])
def test_the_error_of_fp4(blocksize, expected, device):
    weight = normal_weight(device=device)
    error = (dequantize_4bit(quantize_4bit(weight, blocksize, "fp4")) - weight).abs().mean()
    assert error.item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["fp4", "int4", "int4-asym", "nf3"])
def test_a_worse_codebook_is_out_of_bounds(name):
    with pytest.raises(AssertionError):
        assert_error_in_bounds(64, name)


def test_a_better_codebook_is_out_of_bounds_too():
    """The bounds are two-sided: an error too small to be NF4's is as wrong."""
    with pytest.raises(AssertionError):
        assert_error_in_bounds(4096, l1_optimal(4096))


def test_another_blocksize_is_out_of_bounds():
    for blocksize, of in ((64, 32), (64, 128), (4096, 2048)):
        with pytest.raises(AssertionError):
            assert_error_in_bounds(blocksize, of=of)
