"""The comparisons with bitsandbytes that the parity tests, and the proofs of them, share."""

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qlora_lab import blockwise
from qlora_lab.blockwise import QuantizedTensor
from qlora_lab.codebooks import codebook, midpoints
from qlora_lab.double_quant import QuantizedAbsmax

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def reference(weight: Tensor, blocksize: int = 64, quant_type: str = "nf4", double: bool = False):
    """bitsandbytes' packed bytes (flat) and its quantization state."""
    with torch.compiler.set_stance("force_eager"):
        packed, state = bnb.quantize_4bit(
            weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=double
        )
    return packed.view(-1), state


def reference_values(packed: Tensor, state) -> Tensor:
    """What bitsandbytes restores, where it does so rightly; else its bytes through its table.

    Fault: on CPUs with AVX512 `dequantize_4bit` of bitsandbytes 0.50 indexes scales per row, and is
    wrong whenever the last dimension is not a multiple of the block size.
    """
    if len(state.shape) > 1 and state.shape[-1] % state.blocksize == 0:
        with torch.compiler.set_stance("force_eager"):
            values = bnb.dequantize_4bit(packed[:, None], state)
        # A single packed byte comes back transposed, an old convention of bitsandbytes.
        return values.reshape(state.shape)
    return by_table(packed, state)


def by_table(packed: Tensor, state) -> Tensor:
    """Dequantize bitsandbytes' own bytes, scales and table the slow and obvious way."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    weights = state.shape.numel()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:weights].long()
    scale = absmax[torch.arange(weights, device=packed.device) // state.blocksize]
    return (state.code[codes] * scale).to(state.dtype).view(state.shape)


def assert_same_bytes(ours: QuantizedTensor, packed: Tensor, state) -> None:
    """Equal codes and equal scales, in every bit."""
    assert torch.equal(ours.packed, packed)
    assert isinstance(ours.absmax, QuantizedAbsmax) == state.nested
    if not state.nested:
        assert torch.equal(bits(ours.absmax), bits(state.absmax))
        return
    assert torch.equal(ours.absmax.codes, state.absmax)
    assert torch.equal(bits(ours.absmax.absmax2), bits(state.state2.absmax))
    assert torch.equal(bits(ours.absmax.offset), bits(state.offset))


def assert_same_values(ours: QuantizedTensor, packed: Tensor, state) -> None:
    """Equal restored weights (0 and -0 count as equal)."""
    assert torch.equal(blockwise.dequantize_4bit(ours), reference_values(packed, state))


def assert_parity(weight: Tensor, blocksize: int = 64, quant_type: str = "nf4") -> None:
    """Our bytes, scales and restored values of one weight are those of bitsandbytes."""
    packed, state = reference(weight, blocksize, quant_type)
    ours = blockwise.quantize_4bit(weight, blocksize, quant_type)
    assert_same_bytes(ours, packed, state)
    assert_same_values(ours, packed, state)


def bits(values: Tensor) -> Tensor:
    """Floats as integers, so that equality means the same bits."""
    return values.float().view(torch.int32)


def on_the_borders(blocksize: int, quant_type: str = "nf4", ragged: int = 0) -> Tensor:
    """Blocks whose weights lie on the midpoints between two codes, and one step to either side.

    Each block has another scale, so that the rounding of 1/absmax, and of the product, decides.
    """
    border = torch.tensor(midpoints(codebook(quant_type)))
    above, below = border.nextafter(torch.tensor(2.0)), border.nextafter(torch.tensor(-2.0))
    border = torch.cat([border, above, below])
    blocks = 3 * len(border) * 64 // blocksize + 2
    generator = torch.Generator().manual_seed(blocksize + ragged)
    scale = torch.rand(blocks, 1, generator=generator) * 3 + 0.01
    scale[0] = 1.0
    pick = torch.randint(len(border), (blocks, blocksize), generator=generator)
    weight = border[pick] * scale
    weight[:, 0] = scale[:, 0]  # the block's largest
    weight = weight.view(-1)
    return weight[: weight.numel() - blocksize + ragged] if ragged else weight


def at_magnitude(exponent: float, dtype: torch.dtype, shape, seed: int = 0) -> Tensor:
    """Normal weights times a power of ten, kept finite in `dtype`; tiny ones are subnormal."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponent
    top = torch.finfo(dtype).max
    return weight.clamp(-top, top).to(dtype)
