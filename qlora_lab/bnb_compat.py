"""What it takes to reproduce bitsandbytes' bytes on a CPU, and nothing a reader must know.

bitsandbytes' CPU kernel does not look for the nearest of the 256 values when it quantizes scales.
It looks once, in advance, at 65,536 evenly spaced points between -1 and 1, and later takes the
answer of the point that a scale falls on. Near a border between two values the point may lie on
the wrong side: about one scale in 600 lands on a neighbour, never more than four codes away.
That is harmless (the error is that of a near tie), but it is no rounding to the nearest, so it
stays out of `double_quant`; here it is repeated step by step, because training runs can only be
compared byte for byte if both start from the same bytes.

The choice made here: this is the rule of bitsandbytes 0.50 on x86. On ARM the multiplications may
be fused and a byte in a million differ; its CUDA kernel has a rule of its own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qlora_lab.blockwise import QuantizedTensor, quantize_4bit
from qlora_lab.codebooks import codebook as codebook_values
from qlora_lab.double_quant import BLOCKSIZE, QuantizedAbsmax, borders, center
from qlora_lab.errors import InputError

POINTS = 65536


def quantize_absmax_bnb(absmax: Tensor, blocksize: int = BLOCKSIZE) -> QuantizedAbsmax:
    """Quantize block scales to the bytes that bitsandbytes' CPU kernel gives.

    Args:
        absmax: float32, shape (scales,), finite: the largest magnitude of each block of weights.
        blocksize: Scales per second-level scale; bitsandbytes uses 256.

    Returns:
        A `QuantizedAbsmax`, interchangeable with that of `double_quant.quantize_absmax`. A block
        of zeros gets byte 0 (which is multiplied by a scale of 0).

    Raises:
        InputError: As `double_quant.quantize_absmax`.

    Source:
        bitsandbytes, csrc/cpu_ops.cpp, `quantize_cpu`.
    """
    offset, blocks, absmax2 = center(absmax, blocksize)
    scaled = blocks * (1 / absmax2)  # 0 * inf in a block of zeros
    point = (scaled.clamp(-1, 1) + 1) * 0.5 * (POINTS - 1) + 0.5
    codes = _rounding_table(absmax.device)[point.nan_to_num(0).int()]
    return QuantizedAbsmax(codes.view(-1)[: len(absmax)], absmax2.view(-1), offset, blocksize)


def quantize_4bit_bnb(
    weight: Tensor, blocksize: int = 64, codebook: str = "nf4"
) -> QuantizedTensor:
    """Quantize with double quantization, every byte as bitsandbytes on a CPU has it.

    Args:
        weight: float32, float16 or bfloat16, any non-empty shape, all values finite.
        blocksize: Weights per scale: a power of two from 32 to 4096.
        codebook: "nf4" or "fp4".

    Returns:
        What `blockwise.quantize_4bit(weight, ..., double_quant=True)` returns, but for about one
        byte in 600 of its scales.

    Raises:
        InputError: As `blockwise.quantize_4bit`.
    """
    quantized = quantize_4bit(weight, blocksize, codebook)
    return replace(quantized, absmax=quantize_absmax_bnb(quantized.absmax))


def from_quant_state(packed: Tensor, state: Any) -> QuantizedTensor:
    """View a weight that bitsandbytes has quantized as a `QuantizedTensor`, without copying it.

    Args:
        packed: uint8, the first of what `bitsandbytes.functional.quantize_4bit` returns, or the
            data of a `Params4bit` whose layer has not run in evaluation mode (which may repack it).
        state: Its `QuantState`.

    Returns:
        The same codes and scales; `blockwise.dequantize_4bit` restores the same values.

    Raises:
        InputError: If the bytes are not uint8, or the state's codebook or number of bytes does not
            fit.
    """
    if packed.dtype != torch.uint8:
        raise InputError(f"packed weights are {packed.dtype}: view them as uint8 first")
    weights = state.shape.numel()
    if packed.numel() != (weights + 1) // 2:
        raise InputError(f"{packed.numel()} bytes do not hold the {weights} codes of the state")
    if state.quant_type not in ("nf4", "fp4"):
        raise InputError(f"quant_type {state.quant_type!r}: only nf4 and fp4 can be read")
    if tuple(state.code.tolist()) != codebook_values(state.quant_type):
        raise InputError(f"the state's codebook is not the {state.quant_type} known here")
    absmax = state.absmax
    if state.nested:
        second = state.state2
        absmax = QuantizedAbsmax(absmax, second.absmax, state.offset, second.blocksize)
    return QuantizedTensor(
        packed.view(-1), absmax, state.shape, state.dtype, state.blocksize, state.quant_type
    )


@lru_cache(maxsize=8)
def _rounding_table(device: torch.device) -> Tensor:
    """Return the code of each of the 65,536 points from -1 to 1: uint8, shape (65536,)."""
    points = -1 + 2 * torch.arange(POINTS, dtype=torch.float32, device=device) / (POINTS - 1)
    return torch.bucketize(points, borders(device), out_int32=True).to(torch.uint8)
