"""Double quantization: the scales of 4-bit blocks are themselves stored in 8 bits.

Blocks of 64 weights need one 32-bit scale each: half a bit a weight, an eighth of the whole cost.
The scales of one tensor lie close together, far from zero, so:

1. subtract their mean, so that what is left is spread around zero;
2. cut it into blocks of 256 and divide each by its largest magnitude;
3. store the nearest of the 256 values of the dynamic map, one byte a scale.

What remains is 8 bits a scale plus one 32-bit number for 256 scales: 8/64 + 32/(64*256) = 0.127
bits a weight instead of 0.5, and the weights' error grows by about a thousandth.

The choice made here: round to the nearest value, which is what the words above say. bitsandbytes'
CPU kernel rounds through a table and lands up to four codes away for about one scale in 600; the
module `bnb_compat` reproduces that, for the tests that compare bytes, and nothing else needs it.

This module knows only vectors of scales, not weights; `blockwise` calls it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from qlora_lab.codebooks import dynamic_map, midpoints
from qlora_lab.errors import InputError, needs, shown, whole

BLOCKSIZE = 256


@dataclass(frozen=True, eq=False)
class QuantizedAbsmax:
    """Scales in 8 bits: `dynamic_map[codes] * absmax2 + offset`, `absmax2` one for each block.

    Attributes:
        codes: uint8, shape (scales,), indices into `codebooks.dynamic_map()`.
        absmax2: float32, shape (ceil(scales / blocksize),), the scales' scales.
        offset: float32, shape (), the mean of the original scales.
        blocksize: Scales per entry of `absmax2`.
    """

    codes: Tensor
    absmax2: Tensor
    offset: Tensor
    blocksize: int = BLOCKSIZE

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors together."""
        return self.codes.nbytes + self.absmax2.nbytes + self.offset.nbytes

    def to(self, device: torch.device | str) -> QuantizedAbsmax:
        """Return the same scales on `device`."""
        return replace(
            self,
            codes=self.codes.to(device),
            absmax2=self.absmax2.to(device),
            offset=self.offset.to(device),
        )


def quantize_absmax(absmax: Tensor, blocksize: int = BLOCKSIZE) -> QuantizedAbsmax:
    """Quantize a tensor's block scales to 8 bits, rounding to the nearest value.

    Args:
        absmax: float32, shape (scales,), finite: the largest magnitude of each block of weights.
        blocksize: Scales per second-level scale, 1 or more.

    Returns:
        A `QuantizedAbsmax` of `scales` bytes, `ceil(scales / blocksize)` floats and an offset.

    Raises:
        InputError: If `absmax` is no float32 vector, empty or not finite; if `blocksize` is no
            whole number from 1 on.

    Source:
        Dettmers et al., "QLoRA", section 3, Double Quantization.
    """
    offset, blocks, absmax2 = center(absmax, blocksize)
    # A block of zeros (a tensor with a single scale always is one) would divide 0 by 0.
    scaled = torch.where(absmax2 > 0, blocks / absmax2, 0.0)
    codes = torch.bucketize(scaled, borders(absmax.device), out_int32=True).to(torch.uint8)
    return QuantizedAbsmax(codes.view(-1)[: len(absmax)], absmax2.view(-1), offset, blocksize)


def dequantize_absmax(quantized: QuantizedAbsmax) -> Tensor:
    """Restore block scales from their 8 bits.

    Args:
        quantized: What `quantize_absmax` returned, with `scales` codes.

    Returns:
        float32, shape (scales,).

    Raises:
        InputError: If it is something else.
    """
    if not isinstance(quantized, QuantizedAbsmax):
        raise InputError(
            f"{shown(quantized)} is no QuantizedAbsmax; give what quantize_absmax gave"
        )
    values = map_tensor(quantized.codes.device)[quantized.codes.int()]
    second = quantized.absmax2.repeat_interleave(quantized.blocksize)[: len(values)]
    return values * second + quantized.offset


def center(absmax: Tensor, blocksize: int = BLOCKSIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the mean, cut into blocks, and find each block's largest magnitude.

    Args:
        absmax: float32, shape (scales,), finite.
        blocksize: Scales per block, 1 or more.

    Returns:
        The mean, shape (); the centered scales, shape (blocks, blocksize), the last block filled
        up with zeros; the blocks' largest magnitudes, shape (blocks, 1).

    Raises:
        InputError: As `quantize_absmax`.
    """
    needs("tensor", absmax, "absmax")
    if absmax.dtype != torch.float32:
        raise InputError(f"absmax is {absmax.dtype}: scales are float32, convert it with .float()")
    if absmax.dim() != 1 or absmax.numel() == 0:
        raise InputError(f"absmax has shape {tuple(absmax.shape)}: it must be a non-empty vector")
    whole("blocksize", blocksize)
    offset = absmax.mean()
    if not torch.isfinite(offset):
        raise InputError("absmax holds NaN or infinity, or its mean overflows: scales are finite")
    centered = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % blocksize))
    blocks = centered.view(-1, blocksize)
    return offset, blocks, blocks.abs().amax(dim=1, keepdim=True)


@lru_cache(maxsize=8)
def map_tensor(device: torch.device) -> Tensor:
    """Return the dynamic map as a float32 tensor of shape (256,) on `device`."""
    return torch.tensor(dynamic_map(), dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def borders(device: torch.device) -> Tensor:
    """Return the 255 midpoints between its values as a float32 tensor on `device`."""
    return torch.tensor(midpoints(dynamic_map()), dtype=torch.float32, device=device)
