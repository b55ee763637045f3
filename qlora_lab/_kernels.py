"""The arithmetic of `blockwise`, compiled: what `torch.compile` makes of it on a CPU.

`quantize_blocks` is `blockwise.quantize_codes` and `pack` in one pass over the tensor, which reads
every weight once from memory instead of a dozen times. Three things make it fast:

- a chain of fifteen comparisons instead of a search: no branches, eight or sixteen weights at once;
- even and odd weights are handled apart, so that a byte is finished where it is computed;
- the codes are counted as 32-bit floats, the type the comparison's mask has already.

The choice made here: only full blocks, only float32, and only the number of blocks may vary, so
that one compilation serves every tensor of a process with the same block size and codebook. Ragged
ends stay with `blockwise`. The other choice, compiling each shape, would compile for seconds at
every new layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_TINY = 1e-38  # blockwise.TINY, which this module may not import: it stands below blockwise
_MOST_VARIANTS = 8  # torch.compile gives up on a function after eight recompilations
_variants: set[tuple[int, tuple[float, ...]]] = set()
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
    global _broken
    variant = (blocksize, borders)
    if flat.numel() < 2 * blocksize:  # torch.compile would take a single block for a constant
        return None
    if _broken or (variant not in _variants and len(_variants) >= _MOST_VARIANTS):
        return None
    pairs = flat.float().view(-1, blocksize // 2, 2)
    torch._dynamo.mark_dynamic(pairs, 0)
    try:
        packed, absmax = _compile()(pairs, borders)
    except Exception as error:  # whatever a missing or broken toolchain raises
        _broken = True
        log.info("quantizing without torch.compile, which failed: %s", error)
        return None
    _variants.add(variant)
    return packed.view(-1), absmax


@lru_cache(maxsize=1)
def _compile() -> Callable[[Tensor, tuple[float, ...]], tuple[Tensor, Tensor]]:
    """Wrap, at first use: importing this module must compile nothing."""
    return torch.compile(quantize_blocks, dynamic=False)
