"""The arithmetic of `blockwise`, compiled: what `torch.compile` makes of it on a CPU.

`quantize_blocks` is `blockwise.quantize_codes` and `pack` in one pass over the tensor, which reads
every weight once from memory instead of a dozen times. Three things make it fast:

- a chain of fifteen comparisons instead of a search: no branches, eight or sixteen weights at once;
- even and odd weights are handled apart, so that a byte is finished where it is computed;
- the codes are counted as 32-bit floats, the type the comparison's mask has already.

`dequantize_blocks` is the way back, also in one pass. Eager PyTorch writes every weight twice, the
level first and then the product.

The choice made here: only full blocks, only float32 arithmetic, and only the number of blocks may
vary, so that one compilation serves every tensor of a process with the same block size and
codebook. Ragged ends stay with `blockwise`. The other choice, compiling each shape, would compile
for seconds at every new layer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_TINY = 1e-38  # blockwise.TINY, which this module may not import: it stands below blockwise
_MOST_VARIANTS = 8  # torch.compile gives up on a function after eight recompilations
_variants: set[tuple] = set()  # (name of the function, what it was compiled for)
_broken = False

log = logging.getLogger(__name__)


def quantize_blocks(pairs: Tensor, borders: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Quantize and pack full blocks.

    Args:
        pairs: float32, shape (blocks, blocksize / 2, 2): each block's weights in twos.
        borders: Up to 15 ascending midpoints between codebook values.

    Returns:
        The packed codes, uint8 of shape (blocks, blocksize / 2), and the scales, float32 of shape
        (blocks,).
    """
    absmax = pairs.abs().amax(dim=(1, 2))
    reciprocal = (1 / absmax.clamp(min=_TINY))[:, None]
    high = _nearest(pairs[:, :, 0] * reciprocal, borders)
    low = _nearest(pairs[:, :, 1] * reciprocal, borders)
    return (high * 16 + low).to(torch.uint8), absmax


def _nearest(scaled: Tensor, borders: tuple[float, ...]) -> Tensor:
    """Return the number of borders strictly below each value, as float32."""
    code = torch.zeros_like(scaled)
    for index, border in enumerate(borders, start=1):
        code = torch.where(scaled > border, float(index), code)
    return code


def dequantize_blocks(
    packed: Tensor, scales: Tensor, out: Tensor, levels: Tensor, dtype: torch.dtype
) -> Tensor:
    """Unpack and restore full blocks.

    Both weights of a byte are written as one number of twice their size: two writes, each with a
    gap for the other, took twice as long.

    Args:
        packed: uint8, shape (blocks, blocksize / 2).
        scales: float32, shape (blocks,).
        out: Where to write, int64 (float32) or int32 (16 bits), shape (blocks, blocksize / 2): to
            be viewed as `dtype`.
        levels: float32, shape (16,): the value of each code.
        dtype: Of the weights; the product is rounded to it once.

    Returns:
        `out`.
    """
    bytes_ = packed.int()
    first = (levels[bytes_ >> 4] * scales[:, None]).to(dtype)
    second = (levels[bytes_ & 15] * scales[:, None]).to(dtype)
    if dtype == torch.float32:  # of a little-endian number the low half comes first in memory
        low, high = first.view(torch.int32).long(), second.view(torch.int32).long()
        return out.copy_((high << 32) | (low & 0xFFFFFFFF))
    low, high = first.view(torch.int16).int(), second.view(torch.int16).int()
    return out.copy_((high << 16) | (low & 0xFFFF))


def quantize(
    flat: Tensor, blocksize: int, borders: tuple[float, ...]
) -> tuple[Tensor, Tensor] | None:
    """Run `quantize_blocks` compiled, if this machine can.

    Args:
        flat: floating point, on a CPU, shape (weights,), a multiple of `blocksize`.
        blocksize: Weights per scale, even.
        borders: Up to 15 ascending midpoints.

    Returns:
        The packed codes, uint8 of shape (weights / 2,), and the scales, float32 of shape (blocks,);
        None if there is no working compiler or too little to do: the caller then goes on in eager.
    """
    pairs = flat.float().view(-1, blocksize // 2, 2)
    result = _run(quantize_blocks, (blocksize, borders), [pairs], borders)
    return None if result is None else (result[0].view(-1), result[1])


def dequantize(
    packed: Tensor, scales: Tensor, blocksize: int, levels: Tensor, out: Tensor
) -> Tensor | None:
    """Run `dequantize_blocks` compiled, if this machine can.

    Args:
        packed: uint8, on a CPU, shape (weights / 2,), full blocks only.
        scales: float32, shape (blocks,).
        blocksize: Weights per scale, even.
        levels: float32, shape (16,).
        out: Where to write the weights, float32 or 16 bits, shape (weights,).

    Returns:
        `out`, or None as in `quantize`.
    """
    if sys.byteorder != "little":
        return None
    blocks = packed.view(-1, blocksize // 2)
    twos = out.view(torch.int64 if out.dtype == torch.float32 else torch.int32).view_as(blocks)
    by_block = [blocks, scales.view(-1), twos]
    result = _run(dequantize_blocks, (blocksize, out.dtype), by_block, levels, out.dtype)
    return None if result is None else out


def _run(function: Callable, variant: tuple, by_block: list[Tensor], *rest):
    """Call a function compiled, its `by_block` tensors in any number of blocks; None if not."""
    global _broken
    key = (function.__name__, *variant)
    if len(by_block[0]) < 2:  # torch.compile would take a single block for a constant
        return None
    if _broken or (key not in _variants and _full(function)):
        return None
    for tensor in by_block:  # views of the caller's tensors: his own are not marked
        torch._dynamo.mark_dynamic(tensor, 0)
    try:
        with torch.no_grad():  # with and without gradients would be compiled apart
            result = _compile(function)(*by_block, *rest)
    except Exception as error:  # whatever a missing or broken toolchain raises
        _broken = True
        log.info("going on without torch.compile, which failed: %s", error)
        return None
    _variants.add(key)
    return result


def _full(function: Callable) -> bool:
    return sum(key[0] == function.__name__ for key in _variants) >= _MOST_VARIANTS


@lru_cache(maxsize=2)
def _compile(function: Callable) -> Callable:
    """Wrap, at first use: importing this module must compile nothing."""
    return torch.compile(function, dynamic=False)
