"""Quantization on CUDA: the bytes of the CPU, and those of bitsandbytes' own CUDA kernels.

bitsandbytes' CUDA kernels differ from its CPU path in two ways that no test can wish away: they are
compiled with fast arithmetic, so that 1/absmax may be off in its last bit and a weight at a border
between two codes may take the other one; and a block of zeros has bytes of its own (0/0). So codes
are compared with every difference shown to be a near tie, on blocks that are not zero.

Tests that need nothing but another `device` are imported as they are.
"""

import bitsandbytes.functional as bnb
import pytest
import torch
from quant_parity import DTYPES, at_magnitude, bits, on_the_borders
from test_proof_quant import (  # noqa: F401 - collected here once more
    test_the_error_is_bitsandbytes,
    test_the_error_of_fp4,
    test_the_error_with_double_quantization_too,
)

from qlora_lab.blockwise import (
    BLOCKSIZES,
    QuantizedTensor,
    dequantize_4bit,
    fake_quantize,
    quantize_4bit,
    unpack,
)
from qlora_lab.bnb_compat import from_quant_state, quantize_absmax_bnb
from qlora_lab.codebooks import codebook, dynamic_map, midpoints
from qlora_lab.double_quant import center, dequantize_absmax, quantize_absmax
from qlora_lab.errors import InputError

pytestmark = pytest.mark.gpu


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_as_on_the_cpu(weight: torch.Tensor, blocksize: int = 64, name: str = "nf4") -> None:
    here = quantize_4bit(weight, blocksize, name)
    there = quantize_4bit(weight.cuda(), blocksize, name)
    assert there.device.type == "cuda"
    assert torch.equal(there.packed.cpu(), here.packed)
    assert torch.equal(bits(there.absmax.cpu()), bits(here.absmax))
    assert torch.equal(dequantize_4bit(there).cpu(), dequantize_4bit(here))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize_and_dtype(blocksize, dtype):
    assert_same_as_on_the_cpu(normal(24, 4096, seed=blocksize).to(dtype), blocksize)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("shape", [(1,), (65,), (4097,), (3, 5, 7), (64, 48), (33, 64)], ids=str)
def test_ragged_odd_and_many_dimensional(shape, name):
    for dtype in DTYPES:
        assert_same_as_on_the_cpu(normal(*shape).to(dtype), 64, name)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_ties_on_midpoints_and_their_neighbours(blocksize):
    assert_same_as_on_the_cpu(on_the_borders(blocksize), blocksize)
    assert_same_as_on_the_cpu(on_the_borders(blocksize, ragged=17), blocksize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exponent", [-45, -39, -38, -20, 0, 20, 38])
def test_tiny_and_huge_magnitudes(exponent, dtype):
    assert_same_as_on_the_cpu(at_magnitude(exponent, dtype, (7, 96)))


def test_zero_blocks():
    weight = normal(5, 64)
    weight[1] = weight[4] = 0
    assert_same_as_on_the_cpu(weight)
    assert_same_as_on_the_cpu(torch.cat([normal(64), torch.zeros(6)]))


def test_ten_million_random_values():
    assert_same_as_on_the_cpu(normal(156_250, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_bitsandbytes_cuda_kernel(blocksize, dtype):
    weight = normal(64, 4096, seed=blocksize).to(dtype).cuda()
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    ours = quantize_4bit(weight, blocksize)
    assert torch.equal(bits(ours.absmax), bits(state.absmax))
    mine, theirs = (unpack(p, weight.numel()) for p in (ours.packed, packed.view(-1)))
    differ = mine != theirs
    assert differ.float().mean() < 1e-5
    scaled = weight.float().view(-1) / ours.absmax.repeat_interleave(blocksize)
    borders = torch.tensor(midpoints(codebook("nf4")), device="cuda")
    distance = (scaled[differ][:, None] - borders).abs().amin(dim=1)
    assert (distance < 1e-6).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(128, 256), (64, 48), (33, 63)], ids=str)
def test_bitsandbytes_cuda_weights_are_restored_equally(shape, double, quant_type):
    weight = normal(*shape).cuda()
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=quant_type, compress_statistics=double
    )
    theirs = bnb.dequantize_4bit(packed, state)
    ours = dequantize_4bit(from_quant_state(packed, state))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_double_quantization():
    absmax = normal(300_000, 64).abs().amax(dim=1)
    there = quantize_absmax(absmax.cuda())
    theirs, state = bnb.quantize_blockwise((absmax.cuda() - there.offset), blocksize=256)
    assert torch.equal(bits(there.absmax2), bits(state.absmax))
    differ = there.codes != theirs
    assert differ.float().mean() < 0.005
    _, blocks, absmax2 = center(absmax.cuda())
    scaled = (blocks / absmax2).view(-1)[: len(absmax)][differ]
    borders = torch.tensor(midpoints(dynamic_map()), device="cuda")
    assert ((scaled[:, None] - borders).abs().amin(dim=1) < 1.6e-5).all()
    restored = dequantize_absmax(there).cpu()
    assert (restored - absmax).abs().max() < there.absmax2.max().item() / 100


def test_the_cpu_rounding_table_works_on_cuda_too():
    absmax = normal(10_000, 64).abs().amax(dim=1)
    here, there = quantize_absmax_bnb(absmax), quantize_absmax_bnb(absmax.cuda())
    # the mean is summed in another order there, which shifts near ties
    assert (here.codes != there.codes.cpu()).float().mean() < 0.01


def test_moving_between_devices():
    quantized = quantize_4bit(normal(64, 64), double_quant=True)
    there = quantized.to("cuda")
    assert there.device.type == "cuda"
    assert torch.equal(dequantize_4bit(there).cpu(), dequantize_4bit(quantized))
    assert torch.equal(there.to("cpu").packed, quantized.packed)


def test_load_to_the_device(tmp_path):
    quantize_4bit(normal(64, 64)).save(tmp_path / "weight.safetensors")
    loaded = QuantizedTensor.load(tmp_path / "weight.safetensors", device="cuda")
    assert loaded.device.type == "cuda"


def test_fake_quantize():
    weight = normal(64, 65)
    for name in ("nf3", "nf4", "int8"):
        assert torch.equal(
            fake_quantize(weight.cuda(), 64, name).cpu(), fake_quantize(weight, 64, name)
        )


def test_nan_is_refused():
    with pytest.raises(InputError, match="NaN or infinity"):
        quantize_4bit(torch.tensor([1.0, float("nan")], device="cuda"))
